"""One run as a process of its own: `mixora train` on a settings file, with its output in a log.

A process of its own begins with the same random state, holds no memory of others, and can be stopped. Both launchers
start the runs here, so that results do not depend on where they are made.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
GRACE = 30.0  # seconds that a run has to save what it wants to save
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
    """A run that goes on."""

    def __init__(self, job: Job, environment: Mapping[str, str] | None = None) -> None:
        """Start it, with `environment` on top of our own."""
        self.job = job
        self._log = Path(job.directory) / job.log
        self._started = time.monotonic()
        threads = {name: str(job.threads) for name in THREADS}
        with self._log.open("wb") as log:
            # ctrl-C reaches a session of its own through us alone
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mixora.cli", "train", job.settings, "--overwrite"],
                cwd=job.directory,
                env={**os.environ, **threads, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def poll(self) -> Outcome | None:
        """How it ended; None while it goes on."""
        code = self._process.poll()
        return None if code is None else self._describe(code)

    def wait(self) -> Outcome:
        """How it ended, once it has."""
        return self._describe(self._process.wait())

    def interrupt(self) -> None:
        """Ask it to stop."""
        self._send(signal.SIGINT)

    def end(self) -> None:
        """Wait until it has stopped; with force if that takes too long."""
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._send(signal.SIGKILL)
            self._process.wait()

    def _send(self, number: int) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, number)

    def _describe(self, code: int) -> Outcome:
        seconds = time.monotonic() - self._started
        return Outcome(self.job.name, seconds, None if code == 0 else self._read_tail(code))

    def _read_tail(self, code: int) -> str:
        lines = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return "\n".join(lines[-TAIL:]) or f"it ended with code {code} and wrote nothing"


def execute(job: Job) -> Outcome:
    """Make one run and wait for it; whatever interrupts the waiting ends the run too."""
    execution = Execution(job)
    try:
        return execution.wait()
    except BaseException:
        execution.interrupt()
        execution.end()
        raise
