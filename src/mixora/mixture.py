"""The adapted module: what the frozen module computes, plus what the chosen experts add.

beside a linear module:        y = W0 x + s * sum_{e in route(x)} w_e expert_e(x)
behind a module of any kind:   y = f(x) + s * sum_{e in route(x)} w_e expert_e(f(x))

In the latter f runs once and stays out of the weighted sum: the weights sum to 1 there, so nothing is lost, and the
router's gradient is not drowned in the rounding of f(x).
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixora import passes
from mixora.contracts import Expert, Kernel, Loss, Router, Shape
from mixora.errors import MixoraError, ModelError
from mixora.low_rank import LowRank
from mixora.routing import Routing

PREFIX = "mixora_"


@dataclass
class Parts:
    """What serves one adapter at one module; its tensors live in the module.

    `losses`: name, loss and the weight of this site in the model's total (coefficient / number of routed sites).
    `leader`: the module whose router is used, where linears that read the same input share one; empty otherwise.
    """

    expert: Expert
    router: Router
    kernel: Kernel
    shape: Shape
    stream: passes.Stream = "source"
    losses: list[tuple[str, Loss, float]] = field(default_factory=list)
    leader: list["Mixture"] = field(default_factory=list)

    def total(self, routing: Routing) -> tuple[Tensor | None, dict[str, Tensor]]:
        """This site's share of the auxiliary loss, and each term for the log (detached, without its coefficient)."""
        total, terms = None, {}
        for name, loss, weight in self.losses:
            value = loss.of_site(routing)
            if value is not None:
                total = value * weight if total is None else total + value * weight
                terms[name] = value.detach()
        return total, terms


class Mixture(nn.Module, BaseTunerLayer):
    """Wraps a frozen module. Tensors stand in one `ParameterDict` per kind, keyed by adapter name, as PEFT expects.

    `readings`: the auxiliary terms of the last training pass, per adapter. `auxiliary_scale`: factor on the auxiliary
    gradient that this layer adds in backward (1 / number of accumulated micro-batches).
    """

    other_param_names = ("parts", "readings")

    def __init__(self, base_layer: nn.Module, path: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.adapter_layer_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self.parts: dict[str, Parts] = {}
        self.readings: dict[str, dict[str, Tensor]] = {}
        self.auxiliary_scale = 1.0

    def __getattr__(self, name: str) -> Any:
        """Children of the frozen module keep their paths: `mlp.gate_proj`, although `mlp` is wrapped."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            frozen = self.__dict__.get("_modules", {}).get("base_layer")
            if frozen is None or name not in frozen._modules:
                raise
            return frozen._modules[name]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        """Those of the first weight inside, where the frozen module has none itself."""
        for module in base_layer.modules():
            if not isinstance(module, BaseTunerLayer):
                device, dtype = super()._get_base_layer_device_and_dtype(module)
                if device is not None:
                    return device, dtype
        return None, None

    def add(self, adapter: str, parts: Parts, inference_mode: bool) -> None:
        """Create the tensors of `adapter`; experts in the dtype of the frozen module, routers in fp32."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        expert_shapes = parts.expert.parameter_shapes(parts.shape)
        router_shapes = {} if parts.leader else parts.router.parameter_shapes(parts.shape.in_features)
        for shapes, kind_dtype in ((expert_shapes, dtype), (router_shapes, torch.float32)):
            for kind, shape in shapes.items():
                self._bank(kind)[adapter] = nn.Parameter(torch.empty(shape, device=device, dtype=kind_dtype))
        tensors = self.parameters_of(adapter)
        parts.expert.initialise({kind: tensors[kind] for kind in expert_shapes}, parts.shape)
        if router_shapes:
            parts.router.initialise({kind: tensors[kind] for kind in router_shapes})
        self.parts[adapter] = parts
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def _bank(self, kind: str) -> nn.ParameterDict:
        name = PREFIX + kind
        if name not in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
            self.adapter_layer_names += (name,)
        return getattr(self, name)

    def parameters_of(self, adapter: str) -> dict[str, Tensor]:
        """The tensors of one adapter by kind (`A`, `B`, `router`, ...)."""
        banks = {name.removeprefix(PREFIX): getattr(self, name) for name in self.adapter_layer_names}
        return {kind: bank[adapter] for kind, bank in banks.items() if adapter in bank}

    def is_router_trained(self, adapter: str) -> bool:
        """Whether the router that this module uses for `adapter` has trainable tensors."""
        leader = self.parts[adapter].leader[0] if self.parts[adapter].leader else self
        tensors = leader.parameters_of(adapter)
        return any(tensors[kind].requires_grad for kind in tensors if kind.startswith("router"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The frozen module's output plus that of every active adapter: same shape and dtype as the former."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        frozen = y = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        if not isinstance(frozen, Tensor):
            raise ModelError(
                f"{self.path}: a {type(self.get_base_layer()).__name__} gives a {type(frozen).__name__}; "
                "valid for an adapted module: one that gives one tensor"
            )
        for adapter in self.active_adapters:
            if adapter in self.parts:
                y = self._adapt(adapter, x, frozen, y)
        return y

    def _adapt(self, adapter: str, x: Tensor, frozen: Tensor, y: Tensor) -> Tensor:
        here = passes.current()
        if here is None and (seen := passes.recomputed()) is not None:
            with passes.replay(seen):
                return self._adapt(adapter, x, frozen, y)
        here = here or passes.Pass()
        parts = self.parts[adapter]
        delta_TO, routing = self.delta(adapter, x, frozen if parts.expert.reads == "output" else x, here)
        here.record(self.path, adapter, routing)
        y = y + delta_TO.to(y.dtype).reshape(y.shape)
        return self._add_losses(adapter, y, routing, here) if self.training and parts.losses else y

    def delta(self, adapter: str, x: Tensor, read: Tensor, here: passes.Pass) -> tuple[Tensor, Routing]:
        """What the experts add to the output for the module's input `x`, [T, O], and the routing that chose them.

        `read`: the tensor that the experts read, `x` itself or the frozen module's output.
        """
        parts = self.parts[adapter]
        routing = self._route(adapter, x, x.reshape(-1, x.shape[-1]), here)
        read_TI = read.reshape(-1, read.shape[-1])
        delta_TO = parts.expert.delta(read_TI, self.parameters_of(adapter), routing, parts.kernel, self.training)
        return parts.expert.scale(parts.shape) * delta_TO, routing

    def _route(self, adapter: str, x: Tensor, x_TI: Tensor, here: passes.Pass) -> Routing:
        parts = self.parts[adapter]
        leader = parts.leader[0] if parts.leader else self
        if adapter in here.shared:
            path, made_from, routing = here.shared[adapter]
            if path == leader.path and made_from() is x:
                return routing
        routing = parts.router.route(x_TI, leader.parameters_of(adapter), here.tokens(parts.stream, x), self.training)
        here.shared[adapter] = (leader.path, weakref.ref(x), routing)
        return routing

    def _add_losses(self, adapter: str, y: Tensor, routing: Routing, here: passes.Pass) -> Tensor:
        """Let the auxiliary loss reach the router in backward, unless a trainer adds it to the loss itself."""
        if here.owns_losses:
            return y
        total, terms = self.parts[adapter].total(routing)
        if not here.is_replay:
            self.readings[adapter] = terms
        if total is None or not torch.is_grad_enabled():
            return y
        return _AddGradient.apply(y, total * self.auxiliary_scale)

    def as_low_rank(self, adapter: str) -> LowRank:
        """What a merge adds to the frozen weight, as a pair. Only where the routing does not depend on the input."""
        parts = self.parts[adapter]
        if parts.expert.reads == "output":
            raise MixoraError(
                f"{self.path}: cannot be merged: its experts stand behind the module, with a non-linearity inside; "
                "valid: merge adapters beside linear modules (recipe 'lora'), or keep the adapter and use unload()"
            )
        if not parts.router.is_static:
            raise MixoraError(
                f"{self.path}: cannot be merged: its router chooses experts by the input; "
                "valid: merge adapters without routing (recipe 'lora'), or keep the adapter and use unload()"
            )
        tensors = self.parameters_of(adapter)
        return LowRank(tensors["A"], tensors["B"], parts.expert.scale(parts.shape))

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What a merge adds to the frozen weight: [out, in]."""
        return self.as_low_rank(adapter).delta_OI()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the active (or the named) adapters to the frozen weight."""
        for adapter in adapter_names or self.active_adapters:
            if adapter in self.parts and adapter not in self.merged_adapters:
                self.shift_base_weight(self.get_delta_weight(adapter), safe_merge)
                self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Take merged adapters out of the frozen weight again (to rounding)."""
        while self.merged_adapters:
            self.shift_base_weight(-self.get_delta_weight(self.merged_adapters.pop()), safe_merge=False)

    def shift_base_weight(self, delta_OI: Tensor, safe_merge: bool) -> None:
        """Add to the frozen weight; with `safe_merge`, `MixoraError` where the sum is not finite."""
        weight = self.get_base_weight()
        is_transposed = isinstance(self.get_base_layer(), Conv1D)
        shifted = weight + (delta_OI.T if is_transposed else delta_OI).to(weight.dtype)
        if safe_merge and not torch.isfinite(shifted).all():
            raise MixoraError(f"{self.path}: merging gives weights that are not finite; nothing was changed here")
        self.set_base_weight(shifted)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a plain LoRA."""
        parts = self.parts.get(adapter_name)
        return parts is not None and parts.router.is_static and parts.expert.reads == "input"


class _AddGradient(torch.autograd.Function):
    """The identity on `y`; in backward, `loss` gets gradient 1 as if it had been added to the final loss."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor]:
        return grad_y, ctx.saved_tensors[0]
