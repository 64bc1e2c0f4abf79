"""Routing by a learnt threshold: each token to as many experts as exceed it (AdaMoLE, arXiv 2405.00361).

p = softmax(W x);  tau = tau_max * sigmoid(w_tau x + b_tau), tau_max = 1 / E;  route = {e: p_e > tau}
weights = (p - tau) / sum of the same over the route
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mixora.config import Strict
from mixora.contracts import Parameters
from mixora.depth import Count
from mixora.routers.linear import LinearRouter, softmax
from mixora.routing import Routing, Tokens


class ThresholdConfig(Strict):
    """One to all of `num_experts` serve a token.

    `share_router`: one router (and threshold) for the linears of a block that read the same input. `init_std`: standard
    deviation of the router's and the threshold's weights at the start.
    """

    kind: Literal["threshold"] = "threshold"
    num_experts: Count = 8
    share_router: bool = False
    init_std: Annotated[float, Field(gt=0)] = 0.02


class Threshold(LinearRouter):
    """Linear router without bias and linear threshold with one, in fp32 (or float64 for float64 inputs).

    The largest probability is at least 1 / E, so a token keeps an expert as long as tau stays below that; with a
    saturated sigmoid and equal probabilities it keeps none. At p_e = tau the weight is 0, kept or not; such an expert
    counts as not chosen. K = E slots, of which those below the threshold have weight 0.
    """

    Config = ThresholdConfig
    config: ThresholdConfig

    def parameter_shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """W: [E, I]; w_tau: [1, I]; b_tau: [1]."""
        threshold = {"router_threshold": (1, in_features), "router_threshold_bias": (1,)}
        return {**super().parameter_shapes(in_features), **threshold}

    def initialise(self, parameters: Parameters) -> None:
        """Weights normal, mean 0; bias 0, so that tau starts near half of its maximum."""
        super().initialise(parameters)
        nn.init.normal_(parameters["router_threshold"], std=self.config.init_std)
        nn.init.zeros_(parameters["router_threshold_bias"])

    @property
    def is_by_token(self) -> bool:
        """Each has a bias of its own."""
        return False

    @property
    def sums_to_one(self) -> bool:
        """What exceeds the threshold is renormalised."""
        return True

    def rows(self, parameters: Parameters) -> Tensor:
        """W, and w_tau below it."""
        return torch.cat([parameters["router"], parameters["router_threshold"]])

    def decide(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """The experts above the token's threshold; padding has none."""
        logits_TE = z_TC[:, :-1]
        probs_TE = softmax(logits_TE)
        height_T1 = z_TC[:, -1:] + parameters["router_threshold_bias"]
        margin_TE = (probs_TE - height_T1.sigmoid() / self.num_experts).clamp(min=0)
        # the floor keeps a token without any expert free of 0 / 0
        weights_TK = margin_TE / margin_TE.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(margin_TE.dtype).tiny)
        # not "> 0": what is not a number must show
        assigned_TK = (weights_TK != 0) & tokens.valid_T[:, None]
        weights_TK = torch.where(assigned_TK, weights_TK, 0.0)
        experts_TK = torch.arange(self.num_experts, device=z_TC.device).expand(len(z_TC), -1)
        return Routing(
            experts_TK, weights_TK, assigned_TK, assigned_TK, tokens.valid_T, self.num_experts, logits_TE, probs_TE
        )
