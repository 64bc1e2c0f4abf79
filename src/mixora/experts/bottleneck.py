"""Adapter experts in series: U_e gelu(D_e f(x)) (Houlsby et al. 2019, arXiv 1902.00751; PESC, arXiv 2401.02731)."""

import math
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mixora.config import Strict
from mixora.contracts import Expert, Kernel, Parameters, Shape
from mixora.depth import OverDepth
from mixora.routing import Routing


class BottleneckConfig(Strict):
    """`rank`: width of one expert's bottleneck; may vary over depth. `scale`: factor on the sum over experts.

    `dropout` acts on the experts' input, in training only. `biases`: on both projections. `init`: `identity` draws the
    downs Kaiming-uniform and sets the ups to zero, so that the module starts as the frozen one; `normal` draws both
    from N(0, `init_std`^2), near it. Biases start at zero.
    """

    kind: Literal["bottleneck"] = "bottleneck"
    rank: OverDepth = 16
    scale: Annotated[float, Field(gt=0)] = 1.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    biases: bool = False
    init: Literal["identity", "normal"] = "identity"
    init_std: Annotated[float, Field(gt=0)] = 0.02


class Bottleneck(Expert):
    """Parameters A [R, O], the downs, and B [R, O], the ups; with biases also bias_A [R] and bias_B [E, O]."""

    Config = BottleneckConfig
    config: BottleneckConfig
    reads = "output"

    def parameter_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Downs and ups of all experts, expert after expert."""
        rank_sum, width = sum(shape.ranks), shape.out_features
        biases = {"bias_A": (rank_sum,), "bias_B": (len(shape.ranks), width)} if self.config.biases else {}
        return {"A": (rank_sum, width), "B": (rank_sum, width), **biases}

    def initialise(self, parameters: Parameters, shape: Shape) -> None:
        """As `init` says."""
        if self.config.init == "normal":
            nn.init.normal_(parameters["A"], std=self.config.init_std)
            nn.init.normal_(parameters["B"], std=self.config.init_std)
        else:
            nn.init.kaiming_uniform_(parameters["A"], a=math.sqrt(5))
            nn.init.zeros_(parameters["B"])
        for name in parameters.keys() & {"bias_A", "bias_B"}:
            nn.init.zeros_(parameters[name])

    def delta(self, x_TI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """sum_e w_e (U_e gelu(D_e dropout(x) + b_e) + c_e), with the exact GELU."""
        x_TI = F.dropout(x_TI, self.config.dropout, training)
        slots = kernel.expand(x_TI, parameters["A"], routing, parameters.get("bias_A"))
        y_TO = kernel.contract(kernel.map(F.gelu, slots), parameters["B"], routing)
        if self.config.biases:
            y_TO = y_TO + routing.gates_TE().to(y_TO.dtype) @ parameters["bias_B"].to(y_TO.dtype)
        return y_TO

    def scale(self, shape: Shape) -> float:
        """The fixed scale."""
        return self.config.scale
