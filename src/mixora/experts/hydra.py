"""LoRA experts with one common A: B_e A x (HydraLoRA, arXiv 2404.19245)."""

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from mixora.contracts import Kernel, Parameters, Shape
from mixora.experts.lora import Lora, LoraConfig
from mixora.routing import Routing


class HydraConfig(LoraConfig):
    """As for LoRA experts; `rank` is that of the common A."""

    kind: Literal["hydra"] = "hydra"  # type: ignore[assignment]  # the tag that tells the two apart


class Hydra(Lora):
    """Parameters A [rank, I], Kaiming-uniform, stored and computed once per site, and B [E * rank, O], zero.

    A learns what all experts have in common, the B_e what sets them apart. The experts of a site have one rank.
    """

    Config = HydraConfig
    joins = False
    one_rank = True

    def parameter_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """The common A, and B of all experts, expert after expert."""
        return {"A": (shape.ranks[0], shape.in_features), "B": (sum(shape.ranks), shape.out_features)}

    def delta(self, x_TI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """sum_e w_e B_e A dropout(x)."""
        x_TI = F.dropout(x_TI, self.config.dropout, training)
        hidden_Tr = F.linear(x_TI, parameters["A"].to(x_TI.dtype))
        return kernel.contract(kernel.share(hidden_Tr, routing), parameters["B"], routing)
