"""A worker as its parent sees it: a process that is asked and answers, or the reason why it cannot."""

import json
import os
import subprocess
import tempfile
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).parents[2]


class PeerError(Exception):
    """Why a peer has no figures."""


class Worker:
    """One model in the environment of `python`; each answer is waited for at most `seconds`.

    `path`: where that Python finds more than its own packages and the benchmarks.
    """

    def __init__(self, python: str | Path, words: list[str], seconds: float, path: str = "") -> None:
        self.seconds = seconds
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        places = os.pathsep.join([str(ROOT), *filter(None, [path])])
        environment = {**os.environ, "PYTHONPATH": places, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [str(python), "-m", "benchmarks.peers.worker", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.versions: dict[str, str] = {}

    def start(self) -> None:
        """Wait until the model is built and has run a first step. Raises `PeerError`."""
        self.versions = self._read()["versions"]

    def ask(self, what: str) -> float:
        """`time` or `memory` of a step. Raises `PeerError`."""
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        return self._read()["value"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def _read(self) -> dict[str, Any]:
        timer = Timer(self.seconds, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            raise PeerError(f"ended without an answer (limit {self.seconds:g} s): {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        self.log.seek(0)
        lines = self.log.read().strip().splitlines()
        return lines[-1] if lines else f"exit code {self.process.wait()}"
