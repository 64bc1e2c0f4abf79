"""What the runs of a comparison show: for each method its mean, its difference to the reference, and its cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any, Literal

from mixora.comparison.matrix import Matrix, Run
from mixora.comparison.statistics import Difference, Estimate, adjust, compare_pairs, estimate, find_front
from mixora.diagnostics.page import is_named
from mixora.diagnostics.report import BETTER_LOW, RunRecord
from mixora.errors import ConfigError

Cost = Literal["active", "seconds"]
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Score:
    """How a method does in one metric. `left_out`: seeds whose value is not finite. `p`: Holm's, over the data set."""

    values: dict[int, float]
    left_out: tuple[int, ...]
    estimate: Estimate | None
    difference: Difference | None = None
    p: float | None = None


@dataclass(frozen=True)
class Standing:
    """A method on a data set. Counts and costs are means over its runs; of costs None where they are not known."""

    data: str
    method: str
    chosen: str
    scores: dict[str, Score]
    trainable: int
    active: int
    seconds: float | None
    memory_mib: float | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class Results:
    """All of it. `metric`: by data set, what methods are told apart by. `problems`: of failed runs, by name."""

    matrix: Matrix
    standings: dict[str, dict[str, Standing]]
    metric: dict[str, str]
    records: dict[str, RunRecord]
    problems: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, every value of every run included."""
        comparison = self.matrix.comparison
        return {
            "title": comparison.title,
            "settings": comparison.model_dump(mode="json"),
            "reference": comparison.reference,
            "metric": self.metric,
            "standings": [asdict(s) for methods in self.standings.values() for s in methods.values()],
            "not_dominated": {
                data: {cost: sorted(find_cheapest(self, data, cost)) for cost in ("active", "seconds")}
                for data in self.standings
            },
            "runs": [
                _describe_run(run, self.records[run.name]) for run in self.matrix.runs if run.name in self.records
            ],
            "failed": self.problems,
            "missing": [run.name for run in self.matrix.runs if run.name not in self.records],
        }


def is_better_low(metric: str) -> bool:
    """Whether less of a metric is better."""
    return is_named(metric, BETTER_LOW)


def gather(matrix: Matrix, problems: Mapping[str, str]) -> Results:
    """Read the records of all finished runs; `ConfigError` for a metric that they do not hold."""
    records = {run.name: record for run in matrix.runs if (record := run.record()) is not None}
    standings: dict[str, dict[str, Standing]] = {}
    metric = {}
    for data in matrix.comparison.data:
        finished = {
            method: {run.seed: records[run.name] for run in _runs_of(matrix, data, method) if run.name in records}
            for method in matrix.matched[data]
        }
        finished = {method: of_seed for method, of_seed in finished.items() if of_seed}
        if finished:
            standings[data] = _compare(matrix, data, finished)
            metric[data] = _choose_metric(matrix, data, finished)
    return Results(matrix, standings, metric, records, dict(problems))


def find_cheapest(results: Results, data: str, cost: Cost) -> set[str]:
    """The methods that no other one beats in the metric at the same or less cost."""
    metric = results.metric[data]
    sign = 1 if is_better_low(metric) else -1
    points = {}
    for name, standing in results.standings[data].items():
        spent, score = getattr(standing, cost), standing.scores[metric].estimate
        if spent is not None and score is not None:
            points[name] = (float(spent), sign * score.mean)
    return find_front(points)


def _runs_of(matrix: Matrix, data: str, method: str) -> list[Run]:
    return [run for run in matrix.runs if (run.data, run.method) == (data, method)]


def _choose_metric(matrix: Matrix, data: str, finished: Mapping[str, Mapping[int, RunRecord]]) -> str:
    names = _metrics(finished)
    chosen = matrix.comparison.metric or ("loss" if "loss" in names else names[0])
    if chosen not in names:
        raise ConfigError(f"metric: got {chosen!r}; valid for {data}, where it was measured: {', '.join(names)}")
    return chosen


def _metrics(finished: Mapping[str, Mapping[int, RunRecord]]) -> list[str]:
    records = [record for of_seed in finished.values() for record in of_seed.values()]
    return [name for name in dict.fromkeys(name for record in records for name in record.after) if name != "rows"]


def _compare(matrix: Matrix, data: str, finished: Mapping[str, Mapping[int, RunRecord]]) -> dict[str, Standing]:
    scores: dict[str, dict[str, Score]] = {method: {} for method in finished}
    for metric in _metrics(finished):
        for method, score in _score(matrix.comparison.reference, metric, finished).items():
            scores[method][metric] = score
    return {method: _describe(matrix, data, method, finished[method], scores[method]) for method in finished}


def _score(reference: str, metric: str, finished: Mapping[str, Mapping[int, RunRecord]]) -> dict[str, Score]:
    found, differences = {}, {}
    for method, records in finished.items():
        measured = {seed: record.after.get(metric) for seed, record in records.items()}
        values = {seed: value for seed, value in measured.items() if value is not None and math.isfinite(value)}
        left_out = tuple(sorted(measured.keys() - values.keys()))
        found[method] = Score(values, left_out, estimate(list(values.values())) if values else None)
    for method, score in found.items():
        pairs = compare_pairs(score.values, found[reference].values) if reference in found else None
        if method != reference and pairs is not None:
            differences[method] = pairs
    adjusted = adjust({method: d.p for method, d in differences.items() if d.p is not None})
    return {
        method: Score(s.values, s.left_out, s.estimate, differences.get(method), adjusted.get(method))
        for method, s in found.items()
    }


def _describe(
    matrix: Matrix, data: str, method: str, records: Mapping[int, RunRecord], scores: dict[str, Score]
) -> Standing:
    costs = [record.environment for record in records.values()]
    return Standing(
        data=data,
        method=method,
        chosen=matrix.matched[data][method].chosen,
        scores=scores,
        trainable=_mean_count("trainable", records.values()),
        active=_mean_count("active", records.values()),
        seconds=_mean(cost.get("train_seconds") for cost in costs),
        memory_mib=_mean(cost.get("peak_memory_mib") for cost in costs),
        tokens_per_second=_mean(cost.get("train_tokens_per_second") for cost in costs),
    )


def _mean_count(name: str, records: Iterable[RunRecord]) -> int:
    """An allocator that looks at rows may give each seed its own."""
    return round(fmean(record.parameters[name] for record in records))


def _mean(values: Iterable[float | None]) -> float | None:
    known: Sequence[float] = [value for value in values if value is not None]
    return estimate(known).mean if known else None


def _describe_run(run: Run, record: RunRecord) -> dict[str, Any]:
    return {
        "data": run.data,
        "method": run.method,
        "seed": run.seed,
        "folder": str(run.folder),
        "before": record.before,
        "after": record.after,
        "parameters": record.parameters,
        "environment": record.environment,
    }
