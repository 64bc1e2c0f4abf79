"""The lists over depth as a rule gives them (HiLo's groups of layers, arXiv 2502.03884), scaled to a budget."""

from collections.abc import Sequence
from typing import Literal

from mixora.allocators.budget import BudgetConfig
from mixora.contracts import Allocator, Candidate, Evidence


class GroupsConfig(BudgetConfig):
    """Without a budget the rules stand as they are."""

    kind: Literal["groups"] = "groups"


class Groups(Allocator):
    """Keeps the number of experts, and the ratio of the ranks."""

    Config = GroupsConfig

    def weigh(self, candidates: Sequence[Candidate], evidence: Evidence) -> list[float]:
        """The sum of the ranks."""
        return [float(sum(site.ranks)) for site in candidates]
