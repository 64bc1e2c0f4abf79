"""Two passes over a batch, with routes of their own, shall agree (AdaMix, arXiv 2205.12410, eq. 5; Wu et al. 2021,
arXiv 2106.14448)."""

from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from mixora.config import Strict
from mixora.contracts import PassLoss


class ConsistencyConfig(Strict):
    """`coefficient` weighs the loss against the task's; 0 switches it, and with it the second pass, off.

    `recompute`: keep the activations of one pass at a time, and run the first one again in backward: the same
    gradients for less memory and one more forward pass.
    """

    coefficient: Annotated[float, Field(ge=0)] = 0.0
    recompute: bool = False

    @model_validator(mode="after")
    def _fits(self) -> "ConsistencyConfig":
        if self.recompute and not self.coefficient:
            raise ValueError("recompute has no effect with coefficient 0; valid: recompute with a coefficient above 0")
        return self


class Consistency(PassLoss):
    """1/2 [KL(sg(q) || p) + KL(sg(p) || q)] of the two passes' distributions p and q; sg stops the gradient.

    Where outputs are numbers, the squared difference of the two predictions: the KL of one output is zero.
    """

    Config = ConsistencyConfig

    @property
    def recomputes(self) -> bool:
        """As configured."""
        return bool(self.config.recompute)

    def of_items(self, first_NC: Tensor, second_NC: Tensor, is_regression: bool) -> Tensor:
        """As the class says: fp32 (fp64 for fp64 outputs) [N]."""
        dtype = torch.promote_types(first_NC.dtype, torch.float32)
        first_NC, second_NC = first_NC.to(dtype), second_NC.to(dtype)
        if is_regression:
            return (first_NC - second_NC).square().sum(dim=-1)
        p_NC, q_NC = F.log_softmax(first_NC, dim=-1), F.log_softmax(second_NC, dim=-1)
        both = _divergence(q_NC.detach(), p_NC) + _divergence(p_NC.detach(), q_NC)
        return both / 2


def _divergence(of_NC: Tensor, from_NC: Tensor) -> Tensor:
    """KL(of || from) from log-probabilities: [N]."""
    return F.kl_div(from_NC, of_NC, reduction="none", log_target=True).sum(dim=-1)
