"""Soft routing: every token to all experts, weighted by the router's probabilities (MoLoRA, arXiv 2309.05444).

w = softmax(W x)
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mixora.config import Strict
from mixora.contracts import Parameters
from mixora.depth import Count
from mixora.routers.linear import LinearRouter, softmax
from mixora.routing import Routing, Tokens


class SoftConfig(Strict):
    """All of `num_experts` serve each token.

    `share_router`: one router for the linears of a block that read the same input. `init_std`: standard deviation of
    the router's weights at the start.
    """

    kind: Literal["soft"] = "soft"
    num_experts: Count = 8
    share_router: bool = False
    init_std: Annotated[float, Field(gt=0)] = 0.02


class Soft(LinearRouter):
    """Linear router without bias, in fp32 (or float64 for float64 inputs) whatever the activations' dtype; K = E."""

    Config = SoftConfig
    config: SoftConfig

    @property
    def sums_to_one(self) -> bool:
        """A softmax over all experts."""
        return True

    def decide(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """Softmax weights over all experts; padding has none."""
        probs_TE = softmax(z_TC)
        experts_TK = torch.arange(self.num_experts, device=z_TC.device).expand(len(z_TC), -1)
        # not "> 0": what is not a number must show
        assigned_TK = (probs_TE != 0) & tokens.valid_T[:, None]
        weights_TK = torch.where(assigned_TK, probs_TE, 0.0)
        return Routing(
            experts_TK,
            weights_TK,
            assigned_TK,
            assigned_TK,
            tokens.valid_T,
            self.num_experts,
            z_TC,
            probs_TE,
            is_soft=True,
        )
