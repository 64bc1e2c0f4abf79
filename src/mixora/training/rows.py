"""The rows of a run, by task: read, and split into those to train and those to evaluate on."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mixora.config import did_you_mean
from mixora.data import FORMS, Rows, read_rows, splits_of
from mixora.errors import ConfigError, DataError
from mixora.files.documents import find_path
from mixora.training.run_config import DataSection, RunConfig, TaskSection

ALSO_VALIDATION = ("valid", "val", "dev")
"""What the split of validation rows is called where it is not "validation"."""


@dataclass(frozen=True)
class TaskRows:
    """The rows of one task; those to train on are None where they were not asked for."""

    train: Rows | None
    evaluation: Rows


@dataclass(frozen=True)
class Past:
    """A finished run, as far as it matters to rows that its model meets now.

    `labels`: the class names of its head, none where it gives a number; None where it has no head. `sources`: what it
    was trained on.
    """

    labels: tuple[str, ...] | None
    sources: frozenset[Path]

    def has_met(self, source: str) -> bool:
        """Whether the run was trained on rows of `source`."""
        return find_path(source).resolve() in self.sources


def read_tasks(config: RunConfig, to_train: bool, past: Past | None = None) -> tuple[dict[str, TaskRows], Rows]:
    """All rows, and those to evaluate one task on, which all tasks resemble; for the model of a `past` run, if any."""
    sections = config.data.by_task()
    tasks = {name: _read_task(section, config.data, to_train, past) for name, section in sections.items()}
    if config.data.tasks is not None:
        tasks = {name: _name_task(rows, name) for name, rows in tasks.items()}
    if to_train:
        _check_group(config.data.group_by, tasks)
    return tasks, _check_together({name: rows.evaluation for name, rows in tasks.items()})


def _name_task(rows: TaskRows, name: str) -> TaskRows:
    """Every row says which task it is from."""

    def named(part: Rows) -> Rows:
        return replace(part, rows=tuple({**row, "task": name} for row in part))

    return TaskRows(rows.train and named(rows.train), named(rows.evaluation))


def _check_group(field: str | None, tasks: Mapping[str, TaskRows]) -> None:
    """`ConfigError` for a field to group by that no row has on which the run is evaluated."""
    if field is None:
        return
    known: set[str] = set()
    for rows in tasks.values():
        known.update(*rows.evaluation)
    if field not in known:
        raise ConfigError(f"data.group_by: got {field!r}, a field that no row has{did_you_mean(field, known)}")


def _check_together(tasks: Mapping[str, Rows]) -> Rows:
    """The rows of one of the tasks, all of which one model can learn; `ConfigError` or `DataError` if it cannot."""
    labelled = {FORMS[rows.form].labelled for rows in tasks.values()}
    if len(labelled) > 1:
        got = ", ".join(f"{name}: {rows.form}" for name, rows in tasks.items())
        raise ConfigError(
            f"data.tasks: one model cannot write and tell classes apart: got {got}; valid: labelled rows only, or none "
            "(as prompts with completions, or as choices, a language model learns classes too)"
        )
    if len({rows.labels for rows in tasks.values()}) > 1:
        got = "; ".join(f"{name}: {', '.join(rows.labels or ('numbers',))}" for name, rows in tasks.items())
        raise ConfigError(
            f"data.tasks: one head cannot have different labels: got {got}; valid: the same labels in the same order, "
            "a run for each task, or rows of prompts with completions, or of choices, for a language model"
        )
    rows = next(iter(tasks.values()))
    if rows.labels is not None and len(rows.labels) == 1:
        raise DataError(
            f"{rows.origin}: {rows.labels[0]!r} is the only class; valid: two classes or more, or floats to regress on"
        )
    return rows


def _read_task(section: TaskSection, data: DataSection, to_train: bool, past: Past | None) -> TaskRows:
    source, form, labels = section.source, section.form or data.form, past.labels if past else None
    split = _find_split(source, section.evaluation_split or data.evaluation_split)
    if split is None and not to_train and past and not past.has_met(source):
        split = "train"
    if split is not None and not to_train:
        return TaskRows(None, read_rows(source, split, form=form, labels=labels))
    train_rows = read_rows(source, "train", form=form, labels=labels)
    if split is None:
        train_rows, held_out = _hold_out(train_rows)
    else:
        held_out = read_rows(source, split, form=form, labels=train_rows.labels if labels is None else labels)
    count = section.train_rows or data.train_rows
    return TaskRows(first_rows(train_rows, count) if to_train else None, held_out)


def _find_split(source: str, split: str) -> str | None:
    """The split to evaluate on; None where `source` lacks that of validation rows, in place of which some are held out.

    Raises `DataError` where it lacks another one, or has several that go by the names of validation rows.
    """
    known = splits_of(source)
    if split in known:
        return split
    if split != "validation":
        read_rows(source, split)  # raises, and names the splits there are
    others = [name for name in ALSO_VALIDATION if name in known]
    if len(others) > 1:
        raise DataError(
            f"{source}: has the splits {' and '.join(others)}, either of which may be the validation rows; "
            f"valid: data.evaluation_split={others[0]}, or another split"
        )
    return others[0] if others else None


def _hold_out(rows: Rows) -> tuple[Rows, Rows]:
    """The last tenth of the rows is not trained on."""
    count = max(1, len(rows) // 10)
    if len(rows) < 2:
        raise DataError(f"{rows.origin}: one row cannot be split into training and evaluation; valid: two or more")
    held_out = replace(rows, rows=rows[len(rows) - count :], origin=f"{rows.origin} (last {count} rows)")
    return first_rows(rows, len(rows) - count), held_out


def labels_of(rows: Rows) -> tuple[str, ...] | None:
    """The class names, none for numbers, None where rows carry no label."""
    return (rows.labels or ()) if FORMS[rows.form].labelled else None


def first_rows(rows: Rows, count: int | None) -> Rows:
    """The first `count` rows, or all."""
    return replace(rows, rows=rows[:count])


def evaluated_rows(tasks: Mapping[str, TaskRows], config: RunConfig) -> dict[str, Rows]:
    """The rows of each task that a run is evaluated on."""
    return {name: first_rows(rows.evaluation, config.evaluate.limit) for name, rows in tasks.items()}
