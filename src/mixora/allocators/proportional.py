"""Rank proportional to the number of experts: layers with more experts also get larger ones."""

from collections.abc import Sequence
from typing import Literal

from mixora.allocators.budget import BudgetConfig
from mixora.contracts import Allocator, Candidate, Evidence


class ProportionalConfig(BudgetConfig):
    """Only the rules' numbers of experts count, not their ranks."""

    kind: Literal["proportional"] = "proportional"


class Proportional(Allocator):
    """Keeps the number of experts."""

    Config = ProportionalConfig

    def weigh(self, candidates: Sequence[Candidate], evidence: Evidence) -> list[float]:
        """E experts of rank c E have c E² ranks."""
        return [float(len(site.ranks) ** 2) for site in candidates]
