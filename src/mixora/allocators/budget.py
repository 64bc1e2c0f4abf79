"""A budget of parameters, and how it is cut into whole numbers."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Literal

from pydantic import Field

from mixora.config import Strict


class BudgetConfig(Strict):
    """`budget`: how many parameters all sites together may have, routers included; none: as many as the rules give.

    `budget_of`: all that are `trainable`, or those that are `active` for one token.
    """

    budget: Annotated[int, Field(ge=1, le=10**15)] | None = None
    budget_of: Literal["trainable", "active"] = "trainable"


def apportion(
    weights: Sequence[float], least: Sequence[int], prices: Sequence[Fraction], budget: int
) -> list[int] | None:
    """Whole numbers n in proportion to `weights`, not below `least`, that cost sum floor(n * price) <= budget.

    Largest remainders are rounded up first, ties in order, and what is left over is spent as long as anything fits: it
    is less than the cheapest next unit. Prices are above 0. None where `least` alone costs more than the budget.
    """
    if sum(_costs(least, prices)) > budget:
        return None
    targets = _level(weights, least, prices, budget)
    counts = [max(low, int(target)) for low, target in zip(least, targets, strict=True)]
    left = budget - sum(_costs(counts, prices))
    order = sorted(range(len(counts)), key=lambda s: (counts[s] - targets[s], s))
    is_spending = True
    while is_spending:
        is_spending = False
        for s in order:
            step = int((counts[s] + 1) * prices[s]) - int(counts[s] * prices[s])
            if step <= left:
                counts[s] += 1
                left -= step
                is_spending = True
    return counts


def _costs(counts: Sequence[int], prices: Sequence[Fraction]) -> list[int]:
    return [int(count * price) for count, price in zip(counts, prices, strict=True)]


def _level(weights: Sequence[float], least: Sequence[int], prices: Sequence[Fraction], budget: int) -> list[Fraction]:
    """Targets in proportion to the weights where these reach above `least`, and `least` elsewhere; they use it all."""
    exact = [Fraction(weight) for weight in weights]
    free, targets = set(range(len(exact))), [Fraction(low) for low in least]
    while free:
        rest = Fraction(budget) - sum(least[s] * prices[s] for s in range(len(exact)) if s not in free)
        level = rest / Fraction(sum(exact[s] * prices[s] for s in free))
        low = {s for s in free if level * exact[s] < least[s]}
        if not low:
            for s in free:
                targets[s] = level * exact[s]
            break
        free -= low
    return targets


def spread(total: int, parts: int) -> tuple[int, ...]:
    """`total` in `parts` numbers that differ by at most one, the larger ones first."""
    return tuple(total // parts + (part < total % parts) for part in range(parts))
