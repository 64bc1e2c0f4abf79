"""Keeps router logits small (Zoph et al. 2022, arXiv 2202.08906, eq. 5)."""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from mixora.config import Strict
from mixora.contracts import SiteLoss
from mixora.routing import Routing


class ZLossConfig(Strict):
    """`coefficient` weighs the loss against the task's; 0 switches it off."""

    coefficient: Annotated[float, Field(ge=0)] = 0.0


class ZLoss(SiteLoss):
    """mean_t (logsumexp_e logits_te)^2 over real tokens."""

    Config = ZLossConfig

    def add_up(self, routing: Routing) -> tuple[Tensor, Tensor] | None:
        """Squares and tokens: [], []."""
        if routing.logits_TE is None:
            return None
        square_T = routing.logits_TE.logsumexp(dim=-1).square()
        return square_T.where(routing.valid_T, 0.0).sum(), routing.valid_T.sum()

    def conclude(self, *sums: Tensor) -> Tensor:
        """As the class says."""
        squares, tokens = sums
        return squares / tokens.clamp(min=1)
