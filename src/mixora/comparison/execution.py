"""One run as a process of its own: `mixora train` on a settings file, with its output in a log.

A process of its own begins with the same random state, holds no memory of others, and can be stopped. Both launchers
start the runs here, so that results do not depend on where they are made.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mixora.training import lifeline

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
INTERRUPTS = (signal.SIGINT, signal.SIGTERM)
GRACE = 30.0  # seconds that a run has to save what it wants to save
PAUSE = 0.1  # seconds between two looks at a process
TAIL = 12  # lines of a log that tell what went wrong


@dataclass(frozen=True)
class Job:
    """What a process needs to know; paths are relative to `directory`."""

    name: str
    settings: str
    log: str
    directory: str
    threads: int


@dataclass(frozen=True)
class Outcome:
    """How a run ended. `problem`: the end of its log, if it failed."""

    name: str
    seconds: float
    problem: str | None


class Execution:
    """A run as a process; who makes one calls `interrupt` and `end` whatever happens from `start` on."""

    def __init__(self, job: Job, environment: Mapping[str, str] | None = None) -> None:
        """`environment`: on top of our own."""
        threads = {name: str(job.threads) for name in THREADS}
        self.job = job
        self._log = Path(job.directory) / job.log
        self._environment = {**os.environ, **threads, **(environment or {})}
        self._began = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process."""
        command = [sys.executable, "-m", "mixora.cli", "train", self.job.settings, "--overwrite"]
        with self._log.open("wb") as log, hold_signals():
            self._process = lifeline.start(
                command,
                self._environment,
                cwd=self.job.directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def poll(self) -> Outcome | None:
        """How it ended; None while it goes on."""
        code = None if self._process is None else self._process.poll()
        return None if code is None else self._describe(code)

    def wait(self) -> Outcome:
        """How it ended, once it has. Looks now and then: Ray's way to interrupt does not reach who waits for good."""
        while (outcome := self.poll()) is None:
            time.sleep(PAUSE)
        return outcome

    def interrupt(self) -> None:
        """Ask it to stop."""
        self._send(signal.SIGINT)

    def end(self) -> None:
        """Wait until it has stopped; with force if that takes too long."""
        if self._process is None:
            return
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _send(self, number: int) -> None:
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _describe(self, code: int) -> Outcome:
        seconds = time.monotonic() - self._began
        return Outcome(self.job.name, seconds, None if code == 0 else self._read_tail(code))

    def _read_tail(self, code: int) -> str:
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-TAIL:]) or f"it ended with code {code} and wrote nothing"


def execute(job: Job) -> Outcome:
    """Make one run and wait for it; whatever interrupts the waiting ends the run too."""
    execution = Execution(job)
    try:
        execution.start()
        return execution.wait()
    finally:
        execution.interrupt()
        execution.end()


@contextmanager
def hold_signals() -> Iterator[None]:
    """What interrupts us waits until the block ends, so that no process starts without being known."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    # Ray blocks them in its workers, and a process inherits that
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
    before = {number: signal.signal(number, lambda number, _: arrived.append(number)) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for late in arrived:
            signal.raise_signal(late)
