"""Keeps experts evenly used (Fedus et al. 2021, arXiv 2101.03961, eq. 4, in the form that is 1 when balanced)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from mixora.config import Strict
from mixora.contracts import SiteLoss
from mixora.routing import Routing


class LoadBalanceConfig(Strict):
    """`coefficient` weighs the loss against the task's; 0 switches it off."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0


class LoadBalance(SiteLoss):
    """E * sum_e f_e P_e over real tokens.

    f_e: share of the assignments (before capacity) that chose e, a constant for the gradient. P_e: mean probability of
    e. 1 with a uniform router, E/K when all tokens choose the same K experts with certainty. Where routing is soft, f_e
    is the mean weight. N null experts count as further ones, E + N in all, and share their assignments evenly, so that
    the loss does not care which of them is chosen (AdaMoE, arXiv 2406.13233).
    """

    Config = LoadBalanceConfig

    def add_up(self, routing: Routing) -> tuple[Tensor, Tensor, Tensor] | None:
        """Assignments and probability of each column, and tokens: [E + N], [E + N], []."""
        if routing.probs_TE is None:
            return None
        valid_T = routing.valid_T.to(routing.probs_TE.dtype)
        # sums, not matrix products: autocast would compute the latter in low precision
        probs_E = (valid_T[:, None] * routing.probs_TE).sum(dim=0)
        return routing.counts_of_columns().to(probs_E.dtype), probs_E, valid_T.sum()

    def conclude(self, *sums: Tensor) -> Tensor:
        """As the class says."""
        counts_E, probs_E, tokens = sums
        load_E = counts_E / counts_E.sum().clamp(min=1)
        return len(load_E) * (load_E * (probs_E / tokens.clamp(min=1))).sum()
