"""What routers that read a linear map off the token have in common."""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mixora.contracts import Parameters, Router
from mixora.host.devices import without_autocast
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

    def is_plain(self, training: bool) -> bool:
        """Whether the K largest of the products' softmax are the weights, renormalised or not, and nothing else is."""
        return False

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

    def choose(self, z_TC: Tensor, parameters: Parameters, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T, K] each, that `decide` gives real tokens in evaluation; padding may have any."""
        routing = self.decide(z_TC, parameters, tokens, False)
        return routing.weights_TK, routing.experts_TK


def multiply(x_TI: Tensor, w_CI: Tensor) -> Tensor:
    """W x in at least fp32 (fp64 for fp64 inputs), also under autocast: [T, C]."""
    dtype = torch.promote_types(x_TI.dtype, torch.float32)
    with without_autocast(x_TI):
        return F.linear(x_TI.to(dtype), w_CI.to(dtype))


def softmax(z_TC: Tensor) -> Tensor:
    """The softmax over few columns: [T, C]. On a CPU torch's own takes four times as long for 8 of them."""
    is_slow = z_TC.device.type == "cpu" and not torch.compiler.is_compiling()
    return _Softmax.apply(z_TC) if is_slow else z_TC.softmax(dim=-1)


class _Softmax(torch.autograd.Function):
    """Probabilities below the smallest normal number are 0: a product with them takes a CPU many times as long."""

    @staticmethod
    def forward(ctx: Any, z_TC: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        powers_TC = (z_TC - z_TC.amax(dim=-1, keepdim=True)).exp_()
        p_TC = powers_TC.div_(powers_TC.sum(dim=-1, keepdim=True))
        torch.threshold_(p_TC, torch.finfo(p_TC.dtype).tiny, 0.0)
        ctx.save_for_backward(p_TC)
        return p_TC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dp_TC: Tensor | None) -> Tensor | None:
        if dp_TC is None:
            return None
        (p_TC,) = ctx.saved_tensors
        dz_TC = dp_TC * p_TC
        return dz_TC.sub_(p_TC * dz_TC.sum(dim=-1, keepdim=True))
