"""Top-k routing among experts and null experts, which compute nothing (AdaMoE, arXiv 2406.13233).

p = softmax(W x) over E experts and N null experts;  route = TopK(p, K) without the null experts
weights = p on the route, renormalised to sum 1
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mixora.config import Strict
from mixora.contracts import Parameters
from mixora.depth import Count
from mixora.routers.linear import LinearRouter, softmax
from mixora.routing import Routing, Tokens


class NullTopKConfig(Strict):
    """`top_k` choices per token among `num_experts` experts and `null_experts` that compute nothing.

    One choice would always weigh 1 or 0, from which the task could teach the router nothing: at least 2.
    `share_router`: one router for the linears of a block that read the same input. `init_std`: standard deviation of
    the router's weights at the start.
    """

    kind: Literal["null_topk"] = "null_topk"
    num_experts: Count = 8
    null_experts: Count = 8
    top_k: Annotated[int, Field(ge=2, le=2**16)] = 4
    share_router: bool = False
    init_std: Annotated[float, Field(gt=0)] = 0.02

    @model_validator(mode="after")
    def _fits(self) -> "NullTopKConfig":
        if self.top_k > self.num_experts + self.null_experts:
            raise ValueError(
                f"top_k {self.top_k} is more than num_experts {self.num_experts} + null_experts {self.null_experts}"
            )
        return self


class NullTopK(LinearRouter):
    """Linear router without bias, in fp32 (or float64 for float64 inputs) whatever the activations' dtype.

    A token that chose null experts alone keeps W0 x. Slots hold distinct experts, so there are min(K, E) of them.
    """

    Config = NullTopKConfig
    config: NullTopKConfig

    @property
    def num_experts(self) -> int:
        """E, without the null experts."""
        return self.config.num_experts

    @property
    def top_k(self) -> int:
        """min(K, E)."""
        return min(self.config.top_k, self.config.num_experts)

    def parameter_shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """W: [E + N, I], the rows of the null experts last."""
        return {"router": (self.num_experts + self.config.null_experts, in_features)}

    @property
    def sums_to_one(self) -> bool:
        """Renormalised without the null experts."""
        return True

    def decide(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """The experts among the K most probable columns (C = E + N); padding has none."""
        probs_TC = softmax(z_TC)
        columns_TK = probs_TC.topk(self.config.top_k, dim=-1).indices
        is_chosen_TC = torch.zeros_like(probs_TC, dtype=torch.bool).scatter(1, columns_TK, True)
        # a product lets what is not a number through, also where only null experts were chosen
        kept_TE = (probs_TC * is_chosen_TC)[:, : self.num_experts]
        # a slot that a null expert won points at some expert without weight
        weights_TK, experts_TK = kept_TE.topk(self.top_k, dim=-1)
        # not "> 0": what is not a number must show
        assigned_TK = (weights_TK != 0) & tokens.valid_T[:, None]
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(weights_TK.dtype).tiny)
        return Routing(
            experts_TK,
            torch.where(assigned_TK, weights_TK, 0.0),
            assigned_TK,
            assigned_TK,
            tokens.valid_T,
            self.num_experts,
            z_TC,
            probs_TC,
            null_slots_T=(columns_TK >= self.num_experts).sum(dim=1) * tokens.valid_T,
        )
