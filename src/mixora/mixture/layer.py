"""The adapted module: what the frozen module computes, plus what the chosen experts add.

beside a linear module:        y = W0 x + s * sum_{e in route(x)} w_e expert_e(x)
behind a module of any kind:   y = f(x) + s * sum_{e in route(x)} w_e expert_e(f(x))
in all linears of a part:      y = sum_{e in route(x)} w_e FFN_e(x), with the linears W0 + s B_e A_e (see `slots`)

In the second f runs once and stays out of the weighted sum: the weights sum to 1 there, so nothing is lost, and the
router's gradient is not drowned in the rounding of f(x).
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from mixora import passes
from mixora.contracts import Parameters, fill_experts, kept_shapes
from mixora.errors import ModelError, TrainingError
from mixora.host.versions import device_and_dtype_of
from mixora.mixture import decoding, joining, slots
from mixora.mixture.folding import Foldable
from mixora.mixture.parts import Parts
from mixora.passes import injection
from mixora.passes.inputs import Input
from mixora.routers.linear import LinearRouter
from mixora.routing import Routing
from mixora.routing.draws import MEAN, Draw

PREFIX = "mixora_"


class Mixture(nn.Module, Foldable):
    """Wraps a frozen module. Tensors stand in one `ParameterDict` per kind, keyed by adapter name, as PEFT expects.

    `readings`: the auxiliary terms of the last training pass, per adapter. `auxiliary_scale`: factor on the auxiliary
    gradient that this layer adds in backward (1 / number of accumulated micro-batches). `adapters`: those of the whole
    model by name, its `peft_config`.
    """

    other_param_names = ("parts", "readings")

    def __init__(self, base_layer: nn.Module, path: str, adapters: Mapping[str, Any]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path = path
        self.adapters = adapters
        self.adapter_layer_names: tuple[str, ...] = ()
        self.merged_adapters: list[str] = []
        self.parts: dict[str, Parts] = {}
        self.readings: dict[str, dict[str, Tensor]] = {}
        self.auxiliary_scale = 1.0
        self.obstacle: str | None = None

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
                device, dtype = device_and_dtype_of(module)
                if device is not None:
                    return device, dtype
        return None, None

    def add(self, adapter: str, parts: Parts, inference_mode: bool) -> None:
        """Create the tensors of `adapter`; experts in the dtype of the frozen module, routers in fp32."""
        device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        dtype = dtype if dtype is not None and dtype.is_floating_point else torch.float32
        expert_shapes = kept_shapes(parts.expert, parts.router, parts.shape)
        router_shapes = {} if parts.leader else parts.router.parameter_shapes(parts.shape.in_features)
        for shapes, kind_dtype in ((expert_shapes, dtype), (router_shapes, torch.float32)):
            for kind, shape in shapes.items():
                self._bank(kind)[adapter] = nn.Parameter(torch.empty(shape, device=device, dtype=kind_dtype))
        tensors = self.parameters_of(adapter)
        fill_experts(parts.expert, parts.router, parts.shape, tensors)
        if router_shapes:
            parts.router.initialise({kind: tensors[kind] for kind in router_shapes})
        self.parts[adapter] = parts
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """As in PEFT, but where the only active one is deleted, layers that hold different ones agree on the next."""
        others = [name for name in self.adapters if name != adapter_name]
        if self.active_adapters == [adapter_name] and others:
            warnings.warn(f"adapter {adapter_name!r} was active; now {others[0]!r} is", stacklevel=2)
            self.set_adapter(others[0])
        super().delete_adapter(adapter_name)

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

    def copy_adapter(self, source: str, target: str) -> None:
        """Give the tensors of `target` the values of those of `source`, which has the same parts."""
        copies = self.parameters_of(target)
        for kind, tensor in self.parameters_of(source).items():
            copies[kind].data.copy_(tensor.data)

    def tensors_in(self, adapter: str, here: passes.Pass) -> Parameters:
        """Those that compute a pass, by kind: of the expert that was drawn, or the mean, where routes are drawn."""
        return self.parts[adapter].router.serve(self.parameters_of(adapter), here.draw_at(self.path))

    def is_router_trained(self, adapter: str) -> bool:
        """Whether the router that this module uses for `adapter` has trainable tensors."""
        tensors = self.leader_of(adapter).parameters_of(adapter)
        return any(tensors[kind].requires_grad for kind in tensors if kind.startswith("router"))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The frozen module's output plus that of every active adapter: same shape and dtype as the former.

        What the frozen module gives beside hidden states, as the router scores of GPT-OSS, is given on as it is.
        Between the linears of a feed-forward part that experts go through, K times as many rows as in the frozen model.
        """
        here = None if self.training or torch.is_grad_enabled() else passes.current()
        # nothing asks for a graph, a record or a loss
        if here is not None and not here.is_observed and (y := decoding.infer(self, x, here)) is not None:
            return y
        if self.disable_adapters and self.merged:
            self.unmerge()
        if (adapter := self.find_joined(x)) is not None:
            with self._entered(adapter) as here:
                y, routing = joining.compute(self, adapter, x, here)
                return self._finish(adapter, y, routing, here)
        if not self.disable_adapters and (spanning := self._find_spanning()) is not None:
            with passes.entered() as here:
                is_first = self.path in self.parts[spanning].firsts
                return (self._enter_slots if is_first else self._leave_slots)(spanning, x, here)
        given = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return given
        frozen = given[0] if isinstance(given, tuple) and given else given
        if not isinstance(frozen, Tensor):
            raise ModelError(
                f"{self.path}: a {type(self.get_base_layer()).__name__} gives a {type(given).__name__}; valid for an "
                "adapted module: one that gives hidden states, alone or first in a tuple"
            )
        y = frozen
        for adapter in self.active_adapters:
            if adapter in self.parts:
                y = self._adapt(adapter, x, frozen, y)
        return (y, *given[1:]) if isinstance(given, tuple) else y

    def _adapt(self, adapter: str, x: Tensor, frozen: Tensor, y: Tensor) -> Tensor:
        with self._entered(adapter) as here:
            read = frozen if self.parts[adapter].expert.reads == "output" else x
            delta_TO, routing = self.delta(adapter, x, read, here)
            return self._finish(adapter, y + delta_TO.to(y.dtype).reshape(y.shape), routing, here)

    @contextmanager
    def _entered(self, adapter: str) -> Iterator[passes.Pass]:
        """The pass to compute `adapter` in; `TrainingError` where a loss of its own needs two of them."""
        parts = self.parts[adapter]
        with passes.entered(draws=parts.router.draws and self.training) as here:
            if parts.pass_losses and self.training and torch.is_grad_enabled() and not here.owns_losses:
                raise TrainingError(
                    f"{', '.join(f'losses.{name}' for name, _, _ in parts.pass_losses)}: compares two passes over each "
                    "batch, which only mixora's own trainers run; valid: mixora.Trainer, mixora.SFTTrainer, "
                    "mixora.compute_loss in a loop of your own, or coefficient 0"
                )
            yield here

    def _finish(self, adapter: str, y: Tensor, routing: Routing, here: passes.Pass) -> Tensor:
        here.record(self.path, adapter, routing)
        return self._inject(adapter, y, routing, here)

    def find_joined(self, x: Tensor) -> str | None:
        """The one active adapter, if its experts and the frozen module can be computed in one."""
        active = self.active_adapters
        if self.disable_adapters or self.merged or len(active) != 1 or active[0] not in self.parts:
            return None
        return active[0] if self.can_join(active[0], x) else None

    def can_join(self, adapter: str, x: Tensor) -> bool:
        """Whether the kernel computes the frozen module too, and nothing keeps it from doing so."""
        parts = self.parts.get(adapter)
        if parts is None or not parts.kernel.joins or self.active_adapters != [adapter]:
            return False
        obstacle = joining.find_obstacle(self.base_layer, x)
        if obstacle is not None:
            joining.warn_once(self, f"the frozen module {obstacle}")
        return obstacle is None

    def delta(self, adapter: str, x: Tensor, read: Tensor, here: passes.Pass) -> tuple[Tensor, Routing]:
        """What the experts add to the output for the module's input `x`, [T, O], and the routing that chose them.

        `read`: the tensor that the experts read, `x` itself or the frozen module's output.
        """
        routing = self.route(adapter, x, here)
        return self._delta(adapter, read, routing, here.draw_at(self.path)), routing

    def _delta(self, adapter: str, read: Tensor, routing: Routing, draw: Draw = MEAN) -> Tensor:
        """s times the sum over the experts: [T, O]."""
        read_TI = read.reshape(-1, read.shape[-1])
        return self.parts[adapter].delta(read_TI, self.parameters_of(adapter), routing, draw, self.training)

    def _find_spanning(self) -> str | None:
        """The active adapter whose experts go through the whole feed-forward part: no other can act inside of it."""
        active = [adapter for adapter in self.active_adapters if adapter in self.parts]
        spanning = [adapter for adapter in active if self.parts[adapter].firsts]
        others = dict.fromkeys(adapter for adapter in (*active, *self.merged_adapters) if adapter not in spanning[:1])
        if spanning and others:
            raise ModelError(
                f"{self.path}: the experts of adapter {spanning[0]!r} go through the whole feed-forward part, in which "
                f"{', '.join(map(repr, others))} is active or merged too; valid: one adapter there"
            )
        return spanning[0] if spanning else None

    def _enter_slots(self, adapter: str, x: Tensor, here: passes.Pass) -> Tensor:
        """What each chosen expert of a token makes of `x` [B, ..., I], choice after choice: [K * B, ..., O]."""
        parts, routing = self.parts[adapter], self.route(adapter, x, here)
        if not parts.leader:
            here.record(self.path, adapter, routing)
        delta_SO = parts.enter(x.reshape(-1, x.shape[-1]), self.parameters_of(adapter), routing, self.training)
        y = self.base_layer(x)
        y = slots.spread(y, delta_SO.to(y.dtype), parts.router.top_k)
        return self._inject(adapter, y, routing, here)

    def _leave_slots(self, adapter: str, x: Tensor, here: passes.Pass) -> Tensor:
        """The weighted sum over what each chosen expert of a token makes of its slot in `x` [K * B, ..., I].

        The weights sum to 1, so the frozen linear runs once, on the weighted slots.
        """
        parts = self.parts[adapter]
        routing = slots.find_routing(here.shared.get(adapter), parts.leader[0].path, parts.firsts, self.path, x)
        mixed, x_SI = slots.mix(x, routing)
        y = self.base_layer(mixed)
        delta_TO = parts.leave(x_SI, self.parameters_of(adapter), routing, self.training)
        return y + delta_TO.to(y.dtype).reshape(y.shape)

    def leader_of(self, adapter: str) -> "Mixture":
        """The module whose router this one uses for `adapter`."""
        return self.parts[adapter].leader[0] if self.parts[adapter].leader else self

    def route(self, adapter: str, x: Tensor, here: passes.Pass, z_TC: Tensor | None = None) -> Routing:
        """The routing of the tokens of `x`, found again where a module that read `x` has made it in this pass.

        `z_TC`: the products of `x` with the router's rows, where they are known already.
        """
        parts, leader = self.parts[adapter], self.leader_of(adapter)
        shared = here.shared.get(adapter)
        if shared is None or shared.path != leader.path or not shared.made_from.is_now(x):
            tokens = replace(here.tokens(parts.stream, x), draw=here.draw_at(self.path))
            parameters = leader.parameters_of(adapter)
            if z_TC is None:
                routing = parts.router.route(x.reshape(-1, x.shape[-1]), parameters, tokens, self.training)
            else:
                assert isinstance(parts.router, LinearRouter)
                z_TC = z_TC.to(torch.promote_types(z_TC.dtype, torch.float32))
                routing = parts.router.decide(z_TC, parameters, tokens, self.training)
            shared = here.shared[adapter] = passes.Shared(leader.path, Input.of(x, wrapped=True), routing)
        shared.readers.add(self.path)
        return shared.routing

    def _inject(self, adapter: str, y: Tensor, routing: Routing, here: passes.Pass) -> Tensor:
        """Let the auxiliary loss reach the router in backward, unless a trainer adds it to the loss itself."""
        if here.owns_losses or not self.training or not self.parts[adapter].losses:
            return y
        return injection.inject(self, adapter, y, routing, here)


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """The adapted modules of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, Mixture)]
