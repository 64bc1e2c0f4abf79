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

    def of_site(self, routing: Routing) -> Tensor | None:
        """Scalar; None for routers without logits."""
        if routing.logits_TE is None:
            return None
        square_T = routing.logits_TE.logsumexp(dim=-1).square()
        return square_T.where(routing.valid_T, 0.0).sum() / routing.valid_T.sum().clamp(min=1)
