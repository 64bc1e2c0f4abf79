"""The queue: makes the runs that are missing, keeps those that are finished, and can be stopped and started again."""

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol

from mixora.comparison.execution import Job, Outcome
from mixora.comparison.matrix import Matrix, Run
from mixora.errors import ConfigError
from mixora.files.documents import write_yaml
from mixora.training.progress import Progress

QUEUE = "queue"


class Launcher(Protocol):
    """Where and how runs are made."""

    @property
    def threads(self) -> int:
        """Of each run."""

    def launch(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Make all runs and tell each end; runs that go on are stopped where the iteration ends before they do."""


def find_missing(matrix: Matrix, overwrite: bool) -> list[Run]:
    """The runs that are still to be made.

    A run is finished when its record can be read. `ConfigError` names finished runs that were made with other
    settings; with `overwrite` these are made again. Changes nothing.
    """
    missing, changed = [], {}
    for run in matrix.runs:
        is_finished = run.record() is not None
        changes = run.changes() if is_finished else []
        if changes:
            changed[run.name] = changes
        if changes or not is_finished:
            missing.append(run)
    if changed and not overwrite:
        name, changes = next(iter(changed.items()))
        raise ConfigError(
            f"out: {matrix.comparison.out} holds {len(changed)} finished runs that were made with other settings; "
            f"{name}: {'; '.join(changes[:5])}; valid: those settings, another `out`, or --overwrite to make these "
            "runs again"
        )
    return missing


def work_through(
    matrix: Matrix, missing: Sequence[Run], make_launcher: Callable[[], Launcher], progress: Progress
) -> dict[str, str]:
    """Make the missing runs; gives the ends of the logs of those that failed, by name.

    Where it is interrupted, runs that go on are stopped, and it says so before `KeyboardInterrupt` goes on. Raises
    `ConfigError` where the folder is in use, and what `make_launcher` raises.
    """
    if not missing:
        return {}
    queue = Path(matrix.comparison.out) / QUEUE
    with _lock(queue), _sigterm_interrupts():
        launcher = make_launcher()
        progress.say(f"{len(missing)} of {len(matrix.runs)} runs are to be made, {launcher}")
        jobs = [_prepare(run, launcher.threads, queue) for run in missing]
        try:
            return _find_problems(launcher, jobs, {run.name: run for run in missing}, progress)
        except KeyboardInterrupt:
            progress.say("stopped; the same command goes on with the runs that are missing")
            raise


def _find_problems(
    launcher: Launcher, jobs: Sequence[Job], runs: Mapping[str, Run], progress: Progress
) -> dict[str, str]:
    """Make the runs, with a bar over them and a line for each."""
    problems: dict[str, str] = {}
    started = time.monotonic()
    # closed however it ends, since that is what stops the runs
    with progress.task("comparing") as advance, closing(launcher.launch(jobs)) as outcomes:
        advance(0, len(jobs))
        for done, outcome in enumerate(outcomes, 1):
            left = (time.monotonic() - started) / done * (len(jobs) - done)
            advance(done, len(jobs))
            rest = f"; about {_tell_time(left)} left" if done < len(jobs) else ""
            progress.say(f"{done} of {len(jobs)}: {outcome.name} took {_tell_time(outcome.seconds)}{rest}")
            if problem := outcome.problem or _check(runs[outcome.name]):
                problems[outcome.name] = problem
                progress.console.print(f"failed: {outcome.name}\n{problem}", style="red")
    return problems


def _prepare(run: Run, threads: int, queue: Path) -> Job:
    """Write the settings that the process reads; who wants to see a failure repeats it with them."""
    settings, log = queue / f"{run.name}.yaml", queue / f"{run.name}.log"
    settings.parent.mkdir(parents=True, exist_ok=True)
    tree: dict[str, Any] = run.config.model_dump(mode="json")
    settings.write_text(write_yaml(tree), encoding="utf-8")
    return Job(run.name, str(settings), str(log), os.getcwd(), threads)


def _check(run: Run) -> str | None:
    if run.record() is not None:
        return None
    return f"it ended well, but {run.folder} holds no record; every machine that makes runs must see this folder"


@contextmanager
def _lock(queue: Path) -> Iterator[None]:
    """Two queues at work in one folder would replace each other's runs; the lock ends with the process."""
    try:
        queue.mkdir(parents=True, exist_ok=True)
        lock = (queue / "lock").open("w")
    except OSError as error:
        raise ConfigError(f"out: {queue} cannot be written: {error}") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out: another `mixora compare` is at work in {queue.parent}; valid: wait") from None
        yield


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """What ends a job of a cluster stops its runs as ctrl-C does."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
