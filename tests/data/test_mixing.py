"""Several data sets as one: shares against their formula, and what is promised of the order."""

import math
from collections import Counter

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from mixora.data import mix, share_out
from mixora.errors import ConfigError, DataError


def make(sizes):
    """Tasks "0", "1", ... whose rows are numbered."""
    return {str(n): datasets.Dataset.from_dict({"row": list(range(size))}) for n, size in enumerate(sizes)}


def sequences(mixed):
    """The row numbers of each task in the order of their draws."""
    found = {}
    for task, row in zip(mixed["task"], mixed["row"], strict=True):
        found.setdefault(task, []).append(row)
    return found


@pytest.mark.parametrize(
    ("sizes", "options", "expected"),
    [
        ((100, 300), {}, (1 / 4, 3 / 4)),
        ((100, 400), {"temperature": 2}, (1 / 3, 2 / 3)),
        ((8, 27, 64), {"temperature": 3}, (2 / 9, 3 / 9, 4 / 9)),
        ((10, 20), {"temperature": 0.5}, (1 / 5, 4 / 5)),
        ((10, 10**9), {"temperature": 1e9}, (1 / 2, 1 / 2)),
        ((100, 900), {"limit": 300}, (1 / 4, 3 / 4)),
        ((100, 9000), {"limit": 400, "temperature": 2.0}, (1 / 3, 2 / 3)),
        ((5, 5000), {"weights": {"0": 3, "1": 1.0}}, (3 / 4, 1 / 4)),
        ((10, 10**9), {"temperature": 1e-3}, (0, 1)),
    ],
)
def test_shares_follow_the_formula(sizes, options, expected):
    shares = share_out({str(n): size for n, size in enumerate(sizes)}, **options)
    assert list(shares.values()) == pytest.approx(expected)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    temperature=st.floats(0.5, 50),
    rows=st.integers(1, 200),
    seed=st.integers(0, 2**32),
)
def test_draws_meet_the_shares_and_use_every_row_before_one_repeats(sizes, temperature, rows, seed):
    powers = [size ** (1 / temperature) for size in sizes]
    mixed = mix(make(sizes), temperature=temperature, rows=rows, seed=seed)
    counts = Counter(mixed["task"])
    assert len(mixed) == rows
    for task, power in enumerate(powers):
        low, high = binom.ppf([1e-9, 1 - 1e-9], rows, min(power / sum(powers), 1.0))
        assert low - 1 <= counts[str(task)] <= high + 1
    for task, drawn in sequences(mixed).items():
        size = sizes[int(task)]
        for start in range(0, len(drawn), size):
            one_pass = drawn[start : start + size]
            assert len(set(one_pass)) == len(one_pass) and set(one_pass) <= set(range(size))


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=4), limit=st.integers(1, 30), seed=st.integers(0, 99))
def test_an_epoch_holds_each_share_to_within_a_row(sizes, limit, seed):
    mixed = mix(make(sizes), temperature=4, limit=limit, seed=seed)
    powers = [min(size, limit) ** 0.25 for size in sizes]
    counts = Counter(mixed["task"])
    assert len(mixed) == sum(min(size, limit) for size in sizes)
    for task, power in enumerate(powers):
        mean = len(mixed) * power / sum(powers)
        assert math.floor(mean - 1e-6) <= counts[str(task)] <= math.ceil(mean + 1e-6)


@pytest.mark.parametrize("epochs", [1, 3])
def test_in_proportion_every_epoch_is_every_row_once(epochs):
    sizes = (7, 40, 153)
    mixed = mix(make(sizes), rows=epochs * 200, seed=5)
    whole = sorted((str(task), row) for task, size in enumerate(sizes) for row in range(size))
    pairs = list(zip(mixed["task"], mixed["row"], strict=True))
    for start in range(0, len(pairs), 200):
        assert sorted(pairs[start : start + 200]) == whole
        assert pairs[start : start + 200] != whole


def test_a_small_task_of_equal_share_repeats_and_a_rare_one_comes_in_time():
    mixed = mix(make((4, 96)), temperature=1e9)
    assert Counter(mixed["task"]) == {"0": 50, "1": 50}
    rare = mix(make((100, 100)), weights={"0": 1, "1": 1000}, rows=40_000)
    # a fifth of a row in each epoch
    assert 10 <= Counter(rare["task"])["0"] <= 80


def test_the_seed_decides_and_more_rows_continue_fewer():
    tasks = make((10, 25, 40))
    first = mix(tasks, temperature=3, rows=300, seed=1)[:]
    assert mix(tasks, temperature=3, rows=300, seed=1)[:] == first
    assert mix(tasks, temperature=3, rows=300, seed=2)[:] != first
    fewer = mix(tasks, temperature=3, rows=111, seed=1)[:]
    assert fewer == {name: values[:111] for name, values in first.items()}


def test_columns_of_one_task_are_none_in_the_others():
    one = datasets.Dataset.from_dict({"prompt": ["a"], "domain": ["x"]})
    other = datasets.Dataset.from_dict({"prompt": ["b"]})
    rows = {row["task"]: row for row in mix({"one": one, "other": other})}
    assert rows["other"] == {"task": "other", "prompt": "b", "domain": None}
    assert rows["one"] == {"task": "one", "prompt": "a", "domain": "x"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, r"temperature: got 0; valid: a finite number greater than 0"),
        ({"temperature": math.inf}, r"temperature: got inf"),
        ({"limit": 0}, r"limit: got 0; valid: 1 or more"),
        ({"rows": 0}, r"rows: got 0; valid: 1 or more"),
        ({"weights": {"0": 1, "1": 1}, "temperature": 2}, r"weights: got temperature or limit beside them"),
        ({"weights": {"0": 1, "1": 1}, "limit": 2}, r"weights: got temperature or limit beside them"),
        ({"weights": {"0": 1}}, r"weights: none for 1; valid: one for each task"),
        ({"weights": {"0": 1, "1": 1, "sst2": 1}}, r"weights: got 'sst2', which is no task.*known: 0, 1"),
        ({"weights": {"0": 1, "1": -1}}, r"weights\.1: got -1; valid"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        mix(make((3, 4)), **options)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ([{"row": 1}], r"other: got list; valid: a datasets\.Dataset"),
        (datasets.Dataset.from_dict({"row": []}), r"other: has no rows"),
        (datasets.Dataset.from_dict({"row": [1], "task": ["x"]}), r"other: has a column 'task' already"),
        (datasets.Dataset.from_dict({"row": ["x"]}), r"the tasks one, other have columns that do not fit together"),
    ],
)
def test_wrong_tasks_are_named(task, message):
    with pytest.raises(DataError, match=message):
        mix({"one": make((3,))["0"], "other": task})


def test_no_tasks_are_a_mistake():
    with pytest.raises(ConfigError, match="tasks: got none"):
        mix({})
