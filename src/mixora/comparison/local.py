"""Runs on this machine: as many at a time as there are workers, each on its own GPU or its share of the cores."""

import os
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch

from mixora.comparison.execution import PAUSE, Execution, Job, Outcome
from mixora.environment.machine import count_cores
from mixora.errors import ConfigError


@dataclass(frozen=True)
class Local:
    """`workers` runs at a time, of `threads` each, on `devices` in turn: what CUDA calls GPUs; none on a CPU."""

    workers: int
    threads: int
    devices: tuple[str, ...]

    def launch(self, jobs: Sequence[Job]) -> Generator[Outcome]:
        """Make all runs and tell each end; runs that go on are stopped where the iteration ends before they do."""
        waiting, running = list(jobs), dict[int, Execution]()
        try:
            while waiting or running:
                for place in range(self.workers):
                    if waiting and place not in running:
                        running[place] = Execution(waiting.pop(0), self._environment(place))
                        running[place].start()
                ended = {place: outcome for place, run in running.items() if (outcome := run.poll())}
                for place, outcome in ended.items():
                    del running[place]
                    yield outcome
                if not ended:
                    time.sleep(PAUSE)
        finally:
            for execution in running.values():
                execution.interrupt()
            for execution in running.values():
                execution.end()

    def _environment(self, place: int) -> dict[str, str]:
        return {"CUDA_VISIBLE_DEVICES": self.devices[place % len(self.devices)]} if self.devices else {}

    def __str__(self) -> str:
        where = f"GPU {', '.join(self.devices)}" if self.devices else "CPU"
        return f"{self.workers} at a time on {where}, {self.threads} threads each"


def make_local(workers: int | None, threads: int | None, devices: str | None) -> Local:
    """A launcher that uses all it is given: by default one run per visible GPU, or one on all cores of a CPU.

    `devices`: GPUs by number or id, separated by commas. Raises `ConfigError` for GPUs where there are none.
    """
    visible = _visible_devices()
    chosen = tuple(part.strip() for part in devices.split(",") if part.strip()) if devices else visible
    if chosen and not visible:
        raise ConfigError(f"devices: got {devices}; valid here: none, since PyTorch finds no GPU")
    workers = workers or len(chosen) or 1
    return Local(workers, threads or max(1, count_cores() // workers), chosen)


def _visible_devices() -> tuple[str, ...]:
    if not torch.cuda.is_available():
        return ()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return tuple(named.split(",")) if named else tuple(map(str, range(torch.cuda.device_count())))
