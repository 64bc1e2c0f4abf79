"""Sparse routing: each token to its K most probable experts (SiRA, arXiv 2311.09179; HiLo, arXiv 2502.03884).

p = softmax(W x);  p~ = ExpertDropout(p);  route = TopK(p~, K);  weights = p~ on the chosen, renormalised or not
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from mixora.config import Strict
from mixora.contracts import Expert, Parameters
from mixora.depth import OverDepth
from mixora.routers.capacity import CapacityConfig, admit
from mixora.routers.linear import LinearRouter, softmax
from mixora.routing import Routing, Tokens


class TopKConfig(Strict):
    """`top_k` of `num_experts` per token; both may vary over depth.

    `limit_top_k`: a site with fewer experts than `top_k` uses all it has, where this is an error otherwise.
    `renormalise`: weights of the chosen sum to 1. `expert_dropout`: probability with which an expert is withheld from
    a token, in training (inverted scaling). `share_router`: one router for the linears of a block that read the same
    input. `init_std`: standard deviation of the router's weights at the start.
    """

    kind: Literal["topk"] = "topk"
    num_experts: OverDepth = 8
    top_k: OverDepth = 2
    limit_top_k: bool = False
    renormalise: bool = False
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    share_router: bool = False
    init_std: Annotated[float, Field(gt=0)] = 0.02
    capacity: CapacityConfig = CapacityConfig()

    @model_validator(mode="after")
    def _fits(self) -> "TopKConfig":
        are_plain = isinstance(self.top_k, int) and isinstance(self.num_experts, int)
        if are_plain and not self.limit_top_k and self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self


class TopK(LinearRouter):
    """Linear router without bias, in fp32 (or float64 for float64 inputs) whatever the activations' dtype."""

    Config = TopKConfig
    config: TopKConfig

    @property
    def top_k(self) -> int:
        """K."""
        return min(self.config.top_k, self.num_experts) if self.config.limit_top_k else self.config.top_k

    @property
    def sums_to_one(self) -> bool:
        """Only renormalised, and where no capacity limit takes an expert away."""
        return self.config.renormalise and self.config.capacity.capacity_factor is None

    @property
    def is_by_token(self) -> bool:
        """Unless experts are full in evaluation too."""
        return self.config.capacity.capacity_factor is None or not self.config.capacity.capacity_at_inference

    def is_plain(self, training: bool) -> bool:
        """Without a limit of capacity, and where no expert is withheld."""
        return self.config.capacity.capacity_factor is None and not (training and self.config.expert_dropout)

    def objection(self, is_causal: bool, expert: Expert) -> str | None:
        """K may not exceed E, and only admission token by token keeps earlier tokens independent of later ones."""
        if self.top_k > self.num_experts:
            return (
                f"top_k: got {self.top_k} where num_experts is {self.num_experts}; valid: at most that, or limit_top_k"
            )
        capacity = self.config.capacity
        if is_causal and capacity.capacity_factor is not None and capacity.admission != "token":
            return (
                f"admission: got {capacity.admission!r}, which lets a later token displace an earlier one's expert; "
                "valid for a causal model: 'token'"
            )
        return None

    def decide(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """Top-k routing with expert dropout and capacity; padding is never routed."""
        config = self.config
        probs_TE = softmax(z_TC)
        kept_TE = F.dropout(probs_TE, config.expert_dropout, training)
        priority_TK, experts_TK = kept_TE.topk(self.top_k, dim=-1)
        # a slot whose probability was dropped is no choice: weight 0, and it takes no place
        # not "> 0": what is not a number must show
        assigned_TK = (priority_TK != 0) & tokens.valid_T[:, None]
        weights_TK = priority_TK
        if config.renormalise:
            weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
        is_limited = training or config.capacity.capacity_at_inference
        admitted_TK = assigned_TK
        if config.capacity.capacity_factor is not None and (is_limited or tokens.observed):
            admitted_TK = admit(config.capacity, experts_TK, assigned_TK, priority_TK, tokens, config.num_experts)
        weights_TK = torch.where(admitted_TK if is_limited else assigned_TK, weights_TK, 0.0)
        return Routing(
            experts_TK, weights_TK, assigned_TK, admitted_TK, tokens.valid_T, config.num_experts, z_TC, probs_TE
        )

    def choose(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Without the record of what was assigned and admitted, where no capacity limit needs it."""
        if not self.is_by_token:
            return super().choose(z_TC, parameters, tokens)
        if not self.config.renormalise:
            weights_TK, experts_TK = z_TC.softmax(dim=-1).topk(self.top_k, dim=-1)
            return weights_TK, experts_TK
        # the softmax over the chosen is that over all experts, renormalised
        chosen_TK, experts_TK = z_TC.topk(self.top_k, dim=-1)
        return chosen_TK.softmax(dim=-1), experts_TK
