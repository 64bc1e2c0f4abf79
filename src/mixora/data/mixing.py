"""Several data sets as one: how often each is drawn, and the order of the rows.

Shares are those of T5 (arXiv 1910.10683, section 3.5.2: examples-proportional and temperature-scaled mixing). That an
epoch meets the shares to within a row, and that no row comes back before its task is used up, is our choice.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import datasets
import numpy as np

from mixora.config import did_you_mean
from mixora.errors import ConfigError, DataError

COLUMN = "task"


def share_out(
    sizes: Mapping[str, int],
    *,
    temperature: float | None = None,
    limit: int | None = None,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The share of the drawn rows that each task gets; they add up to 1.

    Args:
        sizes: rows of each task.
        temperature: T in p_i ∝ min(n_i, limit)^(1/T). 1, the default: in proportion to the sizes; large: all equal.
        limit: no task counts as larger.
        weights: p_i ∝ weight instead, one for each task.

    Raises:
        ConfigError: weights together with temperature or limit, a task without weight, or a number out of range.
    """
    if weights is not None:
        if temperature is not None or limit is not None:
            raise ConfigError("weights: got temperature or limit beside them; valid: weights, or temperature and limit")
        _check_weights(weights, sizes)
        raw = {name: float(weights[name]) for name in sizes}
    else:
        power = 1 / _positive("temperature", 1.0 if temperature is None else temperature)
        counted = count_rows(sizes, limit)
        # relative to the largest, so that no power of a size overflows
        raw = {name: (size / max(counted.values())) ** power for name, size in counted.items()}
    return {name: value / math.fsum(raw.values()) for name, value in raw.items()}


def count_rows(sizes: Mapping[str, int], limit: int | None = None) -> dict[str, int]:
    """The rows that each task counts as; an epoch draws as many as these together."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: got {limit}; valid: 1 or more, or none")
    return {name: size if limit is None else min(size, limit) for name, size in sizes.items()}


def mix(
    tasks: Mapping[str, datasets.Dataset],
    *,
    temperature: float | None = None,
    limit: int | None = None,
    weights: Mapping[str, float] | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """One data set of rows drawn from several, each with the name of its task in the column `task`.

    An epoch is as many rows as the tasks have together (of each at most `limit`). Each epoch holds every task's share
    of rows, rounded up or down at random, in random order. A task's rows come in random order, and each comes once
    before any comes again; this goes on over the end of an epoch. So at temperature 1 an epoch is every row once,
    while a small task with a large share repeats its rows. The order follows from `seed` alone: more rows continue
    what fewer have begun. Read it in this order, without another shuffling, to keep all of this.

    Args:
        tasks: the rows of each task. Columns that only some have are None in the others.
        temperature: see `share_out`.
        limit: see `share_out`.
        weights: see `share_out`.
        rows: how many to draw; an epoch if not given.
        seed: of the draws.

    Raises:
        ConfigError: see `share_out`; no tasks, or `rows` below 1.
        DataError: a task that is no `datasets.Dataset`, without rows, or with columns that clash with others or `task`.
    """
    _check_tasks(tasks)
    sizes = {name: len(dataset) for name, dataset in tasks.items()}
    shares = share_out(sizes, temperature=temperature, limit=limit, weights=weights)
    epoch = sum(count_rows(sizes, limit).values())
    if rows is not None and rows < 1:
        raise ConfigError(f"rows: got {rows}; valid: 1 or more, or none")
    order = _draw([*sizes.values()], [*shares.values()], epoch, epoch if rows is None else rows, seed)
    named = [dataset.add_column(COLUMN, [name] * len(dataset)) for name, dataset in tasks.items()]
    try:
        joined = datasets.concatenate_datasets(named)
    except (ValueError, TypeError) as error:
        raise DataError(f"the tasks {', '.join(tasks)} have columns that do not fit together: {error}") from None
    return joined.select(order)


def _draw(sizes: Sequence[int], shares: Sequence[float], epoch: int, rows: int, seed: int) -> np.ndarray:
    """Row numbers in the tasks laid end to end, [rows]."""
    of_tasks = np.random.default_rng([seed, 0])
    epochs = [_draw_tasks(shares, epoch, of_tasks) for _ in range(math.ceil(rows / epoch))]
    task_N = np.concatenate(epochs)[:rows]
    order_N = np.empty(rows, dtype=np.int64)
    for task, (size, end) in enumerate(zip(sizes, accumulate(sizes), strict=True)):
        places = np.flatnonzero(task_N == task)
        # a generator of its own, so that a task's order does not depend on how long the others are drawn
        of_rows = np.random.default_rng([seed, 1 + task])
        passes = [of_rows.permutation(size) for _ in range(math.ceil(len(places) / size))]
        order_N[places] = np.concatenate([*passes, np.empty(0, np.int64)])[: len(places)] + end - size
    return order_N


def _draw_tasks(shares: Sequence[float], count: int, generator: np.random.Generator) -> np.ndarray:
    """The task of each draw of an epoch, [count]: systematic sampling, so each count is its mean rounded up or down."""
    points_N = (np.arange(count) + generator.random()) / count
    task_N = np.searchsorted(np.cumsum(shares)[:-1], points_N, side="right")
    return generator.permutation(task_N)


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{name}: got {value}; valid: a finite number greater than 0")
    return value


def _check_weights(weights: Mapping[str, float], tasks: Mapping[str, Any]) -> None:
    for name in weights:
        if name not in tasks:
            raise ConfigError(f"weights: got {name!r}, which is no task{did_you_mean(name, tasks)}")
    lacking = [name for name in tasks if name not in weights]
    if lacking:
        raise ConfigError(f"weights: none for {', '.join(lacking)}; valid: one for each task, or for none")
    for name, weight in weights.items():
        _positive(f"weights.{name}", weight)


def _check_tasks(tasks: Mapping[str, datasets.Dataset]) -> None:
    if not tasks:
        raise ConfigError("tasks: got none; valid: one or more")
    for name, dataset in tasks.items():
        if not isinstance(dataset, datasets.Dataset):
            raise DataError(f"{name}: got {type(dataset).__name__}; valid: a datasets.Dataset")
        if not len(dataset):
            raise DataError(f"{name}: has no rows")
        if COLUMN in dataset.column_names:
            raise DataError(f"{name}: has a column {COLUMN!r} already; valid: another name, by rename_column")
