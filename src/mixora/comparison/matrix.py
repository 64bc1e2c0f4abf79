"""The runs of a comparison: each method with each seed on each data set, at matched parameters."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mixora.bases import Task, sketch_base
from mixora.comparison.matching import Matched, match_methods
from mixora.comparison.settings import Comparison
from mixora.config import read_yaml
from mixora.diagnostics.record import RunRecord, read_record
from mixora.errors import CheckpointError, ConfigError
from mixora.training.material import read_task
from mixora.training.run_config import RunConfig, leaves_of
from mixora.training.run_folder import RUN_FILE
from mixora.training.tasks import name_metrics

# a run with another title, or in another place, is the same run
LEFT_OUT = ("out", "title")


@dataclass(frozen=True)
class Run:
    """One run, as `mixora train` makes it."""

    data: str
    method: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        """`data/method/seed-n`, which is also its place in the folders of a comparison."""
        return f"{self.data}/{self.method}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """Where it leaves its results."""
        return Path(self.config.out)

    def record(self) -> RunRecord | None:
        """What it left behind; None while it is not finished."""
        try:
            return read_record(self.folder)
        except CheckpointError:
            return None

    def changes(self) -> list[str]:
        """In which settings the run in its folder differs from this one."""
        try:
            made = read_yaml(self.folder / RUN_FILE)
        except ConfigError:
            return [f"{RUN_FILE} cannot be read"]
        was, now = dict(leaves_of(made)), dict(leaves_of(self.config.model_dump(mode="json")))
        names = [name for name in {**was, **now} if name.split(".")[0] not in LEFT_OUT]
        return [f"{name}: {was.get(name)!r}, now {now.get(name)!r}" for name in names if was.get(name) != now.get(name)]


@dataclass(frozen=True)
class Matrix:
    """All runs, those that can be compared first. `matched`: how each method is run, by data set."""

    comparison: Comparison
    matched: Mapping[str, Mapping[str, Matched]]
    runs: tuple[Run, ...]


def make_matrix(comparison: Comparison) -> Matrix:
    """Match the methods on each data set's task and lay out the runs; reads data, but no weights, and writes nothing.

    Raises what reading data and matching raise, and `ConfigError` for a metric that the runs would not measure.
    """
    matched, known = {}, {}
    for data in comparison.data:
        task = _read_task(comparison, data)
        if task not in known:
            base = comparison.model
            known[task] = match_methods(sketch_base(base.base, task=task, dtype=base.dtype), comparison)
        matched[data] = known[task]
    runs = tuple(
        _make_run(comparison, data, seed, method)
        for seed in comparison.seed_list
        for data, methods in matched.items()
        for method in methods.values()
    )
    return Matrix(comparison, matched, runs)


def _read_task(comparison: Comparison, data: str) -> Task:
    sections: dict[str, Any] = {
        "model": comparison.model,
        "data": comparison.data[data],
        "evaluate": comparison.evaluate,
    }
    config = RunConfig(**sections)
    task, held_out = read_task(config)
    measured = name_metrics(config, held_out)
    if not measured:
        raise ConfigError(
            f"evaluate.metrics: no mean over the tasks of {data} has any of them; valid: loss beside them"
        )
    if comparison.metric is not None and comparison.metric not in measured:
        raise ConfigError(
            f"metric: got {comparison.metric!r}; valid for {data}: {', '.join(measured)}, "
            "or another one that evaluate.metrics names"
        )
    return task


def _make_run(comparison: Comparison, data: str, seed: int, method: Matched) -> Run:
    sections: dict[str, Any] = {
        "model": comparison.model,
        "data": comparison.data[data],
        "adapter": method.adapter,
        "train": comparison.train.model_copy(update={"seed": seed}),
        "evaluate": comparison.evaluate,
    }
    folder = Path(comparison.out) / "runs" / data / method.method / f"seed-{seed}"
    config = RunConfig(**sections, out=str(folder), title=f"{method.method} on {data}, seed {seed}")
    return Run(data, method.method, seed, config)
