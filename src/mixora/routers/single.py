"""No choice at all: one expert for every token. A mixture with this router is plain LoRA."""

from typing import Literal

from torch import Tensor

from mixora.config import Strict
from mixora.contracts import Parameters, Router
from mixora.routing import Routing, Tokens


class SingleConfig(Strict):
    """Nothing to set."""

    kind: Literal["single"] = "single"


class Single(Router):
    """Weight 1 on expert 0."""

    Config = SingleConfig
    is_static = True
    joins = True
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
        return Routing.even(tokens.valid_T, (0,), 1)
