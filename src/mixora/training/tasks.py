"""Scores of several tasks: each task's own, their means, and both as tables."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from rich.table import Table

from mixora.diagnostics.page import format_value
from mixora.evaluate import METRICS, Evaluation, EvaluationConfig, Formed, choose_metrics, default_metrics
from mixora.training.run_config import RunConfig

Scores = Mapping[str, float | None]


def evaluation_of(config: RunConfig, rows: Formed) -> EvaluationConfig:
    """How a run measures the rows of one task.

    Of several tasks, metrics not asked for by name include the loss where the rows have one, so that tasks can be
    compared.
    """
    settings = config.evaluate
    if config.data.tasks is None or settings.metrics is not None or "loss" not in METRICS[rows.form]:
        return settings
    usual = default_metrics(rows)
    return settings.model_copy(update={"metrics": (*usual, *(() if "loss" in usual else ("loss",)))})


def name_metrics(config: RunConfig, held_out: Mapping[str, Formed]) -> tuple[str, ...]:
    """The metrics that a run tells of its held-out rows, which are given by task; of several tasks, those with a mean.

    Raises `ConfigError` for a metric asked for that the rows do not have.
    """
    return _shared([choose_metrics(rows, evaluation_of(config, rows)) for rows in held_out.values()])


def average(tasks: Mapping[str, Evaluation]) -> dict[str, float]:
    """The mean over tasks of each metric that all of them have; of one task its metrics.

    Every task counts the same, whatever its number of rows. A mean of perplexities says nothing, so there is none.
    """
    found = [evaluation.metrics for evaluation in tasks.values()]
    return {name: sum(each[name] for each in found) / len(found) for name in _shared(found)}


def _shared(tasks: Sequence[Collection[str]]) -> tuple[str, ...]:
    """The metrics that have a mean over tasks, by the metrics of each."""
    first, *others = tasks
    if not others:
        return tuple(first)
    return tuple(name for name in first if name != "perplexity" and all(name in other for other in others))


def mixture_table(tasks: Mapping[str, Mapping[str, Any]]) -> Table:
    """What is drawn from each task, for a terminal; rows as in `TrainingSet.tasks`."""
    table = Table("task", title=f"{len(tasks)} tasks")
    for column in ("rows", "share", "drawn", "passes"):
        table.add_column(column, justify="right")
    for name, task in tasks.items():
        passes = f"{task['drawn'] / task['rows']:.2f}"
        table.add_row(name, f"{task['rows']:,}", f"{task['share']:.1%}", f"{task['drawn']:,}", passes)
    return table


def scores_table(title: str, tasks: Mapping[str, Mapping[str, Scores]]) -> Table:
    """Each task's scores below each other, for a terminal: task, column ("before", "after", ...), metric, value."""
    columns = list(next(iter(tasks.values())))
    table = Table("task", "metric", *columns, title=title)
    for task, scores in tasks.items():
        for place, metric in enumerate(scores[columns[0]]):
            values = (format_value(scores[column].get(metric), metric) for column in columns)
            table.add_row("" if place else task, metric.replace("_", " "), *values)
        table.add_section()
    return table


def split_sites(sites: list[dict[str, Any]], tasks: Mapping[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What `inspect` found on all rows, and below `tasks` what it found on those of each task."""
    shared = ("path", "adapter", "num_experts", "top_k")

    def own(site: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in site.items() if name not in shared}

    return [
        {**site, "tasks": {name: own(found[place]) for name, found in tasks.items()}}
        for place, site in enumerate(sites)
    ]
