"""Cutting a budget into whole numbers: properties, and cases by hand."""

from fractions import Fraction

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mixora.allocators.budget import apportion, spread

SITES = st.lists(
    st.tuples(
        st.floats(1e-9, 1e9),  # weight
        st.integers(1, 9),  # least
        st.fractions(Fraction(1, 4), 20_000, max_denominator=12),  # price
    ),
    min_size=1,
    max_size=12,
)


def cost(counts, prices):
    return sum(int(count * price) for count, price in zip(counts, prices, strict=True))


@given(SITES, st.integers(0, 10**7))
@example([(1.0, 1, Fraction(1, 4))] * 3, 110)
def test_the_budget_is_met_within_one_unit_and_never_passed(sites, extra):
    weights, least, prices = zip(*sites, strict=True)
    budget = cost(least, prices) + extra
    counts = apportion(weights, least, prices, budget)
    assert all(count >= low for count, low in zip(counts, least, strict=True))
    assert 0 <= budget - cost(counts, prices) <= max(prices) + 1
    assert apportion(weights, least, prices, budget) == counts


@given(SITES)
def test_a_budget_below_the_least_is_none(sites):
    weights, least, prices = zip(*sites, strict=True)
    assert apportion(weights, least, prices, cost(least, prices) - 1) is None


@pytest.mark.parametrize(
    ("weights", "least", "prices", "budget", "expected"),
    [
        ([1, 2, 1], [1, 1, 1], [1, 1, 1], 8, [2, 4, 2]),
        # 2.5, 2.5, 5: the earlier half is rounded up
        ([1, 1, 2], [1, 1, 1], [1, 1, 1], 10, [3, 2, 5]),
        # 10 / 111: the first stays at its least, the others share 8 as 1 to 10 (0.73 and 7.27)
        ([1, 10, 100], [2, 1, 1], [1, 1, 1], 10, [2, 1, 7]),
        # units of 3 and 5 for 20: level 2.5, both floor to 2, 4 are left, which buy one 3
        ([1, 1], [1, 1], [3, 5], 20, [3, 2]),
    ],
)
def test_by_hand(weights, least, prices, budget, expected):
    assert apportion(weights, least, [Fraction(price) for price in prices], budget) == expected


@pytest.mark.parametrize(("total", "parts", "expected"), [(7, 3, (3, 2, 2)), (3, 3, (1, 1, 1)), (9, 1, (9,))])
def test_spread(total, parts, expected):
    assert spread(total, parts) == expected
