"""LoRA experts: B_e A_e x (Hu et al. 2021, arXiv 2106.09685; as experts in SiRA, arXiv 2311.09179)."""

import math
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mixora.config import Strict
from mixora.contracts import Expert, Kernel, Parameters, Shape
from mixora.depth import OverDepth
from mixora.routing import Routing


class LoraConfig(Strict):
    """`rank` of one expert; may vary over depth.

    The sum over experts is scaled by alpha / rank, or by `scale` where alpha is not given: an override of `scale` takes
    a recipe's alpha away.
    `dropout` acts on the experts' input, in training only.
    """

    kind: Literal["lora"] = "lora"
    rank: OverDepth = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    replaces: ClassVar[Mapping[str, str]] = {"scale": "alpha"}


class Lora(Expert):
    """Parameters A [R, I], Kaiming-uniform, and B [R, O], zero: the adapted module starts as the frozen one."""

    Config: ClassVar[type[LoraConfig]] = LoraConfig
    joins = True
    config: LoraConfig

    def parameter_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """A and B of all experts, expert after expert."""
        rank_sum = sum(shape.ranks)
        return {"A": (rank_sum, shape.in_features), "B": (rank_sum, shape.out_features)}

    def initialise(self, parameters: Parameters, shape: Shape) -> None:
        """A as `nn.Linear` does (a = sqrt 5: the bound depends on I alone), B zero."""
        nn.init.kaiming_uniform_(parameters["A"], a=math.sqrt(5))
        nn.init.zeros_(parameters["B"])

    def delta(self, x_TI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """sum_e w_e B_e A_e dropout(x)."""
        x_TI = F.dropout(x_TI, self.config.dropout, training)
        return kernel.contract(kernel.expand(x_TI, parameters["A"], routing), parameters["B"], routing)

    def scale(self, shape: Shape) -> float:
        """alpha / rank, the largest rank where those of a site differ; or the fixed scale."""
        return self.config.scale if self.config.alpha is None else self.config.alpha / max(shape.ranks)
