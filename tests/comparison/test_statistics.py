"""Against scipy's own tests, a table of Student's t, a published example of Holm's procedure, and brute force."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mixora.comparison.statistics import adjust, compare_pairs, estimate, find_front

numbers = st.floats(-100, 100, allow_subnormal=False).map(lambda x: round(x, 3))


def test_interval_from_a_table():
    # t(0.975, 2) = 4.303; the deviation of 1, 2, 3 is 1
    found = estimate([1.0, 2.0, 3.0])
    assert (found.mean, found.n) == (2.0, 3)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)


def test_one_value_has_no_interval():
    assert estimate([2.5]).half is None
    one = compare_pairs({0: 1.0}, {0: 3.0})
    assert (one.mean, one.half, one.n, one.p) == (-2.0, None, 1, None)


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=8))
def test_pairs_against_scipy(pairs):
    values, others = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    found = compare_pairs(values, others)
    if len({a - b for a, b in pairs}) == 1:
        assert found.half == pytest.approx(0, abs=1e-12)
        return
    test = stats.ttest_rel(list(values.values()), list(others.values()))
    interval = test.confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(interval.low, rel=1e-6, abs=1e-9)
    assert found.mean + found.half == pytest.approx(interval.high, rel=1e-6, abs=1e-9)
    assert found.p == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)


def test_only_shared_seeds_are_paired():
    found = compare_pairs({0: 1.0, 1: 2.0, 2: 9.0}, {1: 1.0, 0: 0.5, 7: 3.0})
    assert (found.mean, found.n) == (0.75, 2)
    assert compare_pairs({0: 1.0}, {1: 1.0}) is None


def test_seeds_that_do_not_vary():
    assert compare_pairs({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}).p == 1.0
    assert compare_pairs({0: 2.0, 1: 2.0}, {0: 1.0, 1: 1.0}).p == 0.0


def test_holm_by_hand():
    # sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1, made monotone
    given_p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert adjust(given_p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert adjust({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


@given(st.dictionaries(st.text(max_size=2), st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=8))
def test_front_against_its_definition(points):
    front = find_front(points)
    for name, (cost, loss) in points.items():
        beaten = [other for other, (c, q) in points.items() if c <= cost and q <= loss and (c < cost or q < loss)]
        assert (name in front) == (not beaten)
