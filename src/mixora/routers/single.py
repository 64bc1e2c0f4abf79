"""No choice at all: one expert for every token. A mixture with this router is plain LoRA."""

from typing import Literal

import torch
from torch import Tensor

from mixora.config import Strict
from mixora.contracts import Parameters, Router
from mixora.routing import Routing, Tokens


class SingleConfig(Strict):
    """Nothing to set."""

    kind: Literal["single"] = "single"


class Single(Router):
    """Weight 1 on expert 0. Padding passes too: without a choice it disturbs nobody."""

    Config = SingleConfig
    is_static = True
    num_experts = 1
    top_k = 1

    def parameter_shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """None."""
        return {}

    def initialise(self, parameters: Parameters) -> None:
        """Nothing to fill."""

    @property
    def sums_to_one(self) -> bool:
        """One expert of weight 1."""
        return True

    def route(self, x_TI: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """All tokens to expert 0."""
        count = len(x_TI)
        experts_TK = torch.zeros(count, 1, dtype=torch.long, device=x_TI.device)
        weights_TK = torch.ones(count, 1, dtype=torch.float32, device=x_TI.device)
        assigned_TK = tokens.valid_T[:, None]
        return Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, tokens.valid_T, 1)
