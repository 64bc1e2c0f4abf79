"""What routers that read a linear map off the token have in common."""

from abc import abstractmethod
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mixora.contracts import Parameters, Router
from mixora.routing import Routing, Tokens


class LinearRouter(Router):
    """One linear map W without bias, started as a normal; all experts may serve a token unless a router chooses fewer.

    The configuration has `num_experts` and `init_std`.
    """

    joins = True

    @property
    def is_by_token(self) -> bool:
        """Whether, in evaluation, nothing but its products decides for a token: then alike routers decide at once."""
        return True

    @property
    def num_experts(self) -> int:
        """E."""
        return self.config.num_experts

    @property
    def top_k(self) -> int:
        """K = E."""
        return self.num_experts

    def parameter_shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """W: [E, I]."""
        return {"router": (self.num_experts, in_features)}

    def initialise(self, parameters: Parameters) -> None:
        """Normal, mean 0."""
        nn.init.normal_(parameters["router"], std=self.config.init_std)

    def rows(self, parameters: Parameters) -> Tensor:
        """All that is multiplied with x: [C, I]."""
        return parameters["router"]

    def route(self, x_TI: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """The products in at least fp32, then the decision."""
        return self.decide(multiply(x_TI, self.rows(parameters)), parameters, tokens, training)

    @abstractmethod
    def decide(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """The routing of T tokens by the products of x and the rows, in at least fp32."""


def multiply(x_TI: Tensor, w_CI: Tensor) -> Tensor:
    """W x in at least fp32 (fp64 for fp64 inputs), also under autocast: [T, C]."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    device = x_TI.device.type
    # the meta device, on which plans are made, knows no autocast
    off = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with off:
        return F.linear(x_TI.to(dtype), w_CI.to(dtype))
