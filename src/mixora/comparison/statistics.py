"""Means with intervals, paired differences, and which methods no other one beats in both quality and cost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of `n` values and half the width of its interval, None for one value."""

    mean: float
    half: float | None
    n: int


@dataclass(frozen=True)
class Difference(Estimate):
    """The mean of `n` differences; `p`: of the hypothesis that there is none, None for one pair."""

    p: float | None


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and Student's t interval at 95 %; the values, one or more, are taken for draws of a normal distribution."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Estimate(mean, None, n)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    return Estimate(mean, float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * deviation / math.sqrt(n), n)


def compare_pairs(values: Mapping[int, float], others: Mapping[int, float]) -> Difference | None:
    """`values` minus `others` over the seeds that both have, with the two-sided paired t test; None without any."""
    differences = [values[seed] - others[seed] for seed in sorted(values.keys() & others.keys())]
    if not differences:
        return None
    found = estimate(differences)
    if found.half is None:
        return Difference(found.mean, None, found.n, None)
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, found.n - 1))
    # seeds that all differ by the same, to the last bit, leave no doubt; those that do not differ at all no difference
    if found.half == 0:
        return Difference(found.mean, 0.0, found.n, 1.0 if found.mean == 0 else 0.0)
    p = 2 * float(stats.t.sf(abs(found.mean) / (found.half / quantile), found.n - 1))
    return Difference(found.mean, found.half, found.n, p)


def adjust(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment (1979): with many comparisons, some look different by chance."""
    adjusted, top = {}, 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        top = max(top, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = top
    return adjusted


def find_front(points: Mapping[str, tuple[float, float]]) -> set[str]:
    """The points (cost, loss) that no other one dominates, by at most as much of both and less of one."""

    def dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return one != other and one[0] <= other[0] and one[1] <= other[1]

    return {name for name, point in points.items() if not any(dominates(other, point) for other in points.values())}
