"""Linears that read the same input, where no one asks for gradients or records: in decoding, above all.

For a few tokens the time goes into the number of operations. So whichever of the linears is called first computes them
all: one product with the rows of their routers and experts, one decision, one multiplication by the gates. These rows
stand side by side in a `Stack`. It lasts as long as the cache of keys and values that it was made for, and is made anew
once a weight has changed in place or another prompt begins. A single token reads the rows of its chosen experts alone.
"""

from dataclasses import dataclass
from functools import cache
from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from mixora.contracts import Parameters
from mixora.kernels.sorting import cast_as_autocast
from mixora.kernels.stacked import segments_ER
from mixora.mixture.joining import find_members
from mixora.mixture.parts import Parts
from mixora.passes import Pass
from mixora.passes.inputs import Input
from mixora.routers.linear import LinearRouter
from mixora.routing.draws import Serving

# on a CPU, products of fewer tokens than this take longer in low precision than in fp32
FEW = 24
_VERSION = attrgetter("_version")


@dataclass(slots=True)
class Place:
    """One of the linears of a stack, `module`, and what the stack was made for there.

    b_RO: B in the stack's dtype. a_rI, b_rO: A and B of each expert. `scale`: the factor on what they add.
    """

    module: Any
    adapter: str
    parts: Parts
    frozen: Any
    weight: Tensor
    is_transposed: bool
    b_RO: Tensor
    a_rI: tuple[Tensor, ...]
    b_rO: tuple[Tensor, ...]
    scale: float

    @classmethod
    def of(cls, module: Any, adapter: str, a_RI: Tensor, b_RO: Tensor, ranks: tuple[int, ...]) -> "Place":
        """The module as it is now, with A and B of experts of these `ranks`."""
        frozen, parts = module.base_layer, module.parts[adapter]
        experts = b_RO, a_RI.split(ranks), b_RO.split(ranks)
        is_transposed, scale = isinstance(frozen, Conv1D), parts.expert.scale(parts.shape)
        return cls(module, adapter, parts, frozen, frozen.weight, is_transposed, *experts, scale)

    def compute_frozen(self, x_TI: Tensor) -> Tensor:
        """What the frozen linear gives: [T, O]."""
        return F.linear(x_TI, self.weight.T if self.is_transposed else self.weight, self.frozen._parameters["bias"])

    def add_chosen(self, y_1O: Tensor, x_1I: Tensor, weights_K: list[float], experts_K: list[int]) -> None:
        """To the output for a single token, in the stack's dtype, what its experts add, times the weights."""
        for weight, expert in zip(weights_K, experts_K, strict=True):
            y_1O.addmm_(F.linear(x_1I, self.a_rI[expert]), self.b_rO[expert], alpha=weight * self.scale)

    def is_unchanged(self, dtype: torch.dtype) -> bool:
        """Whether the module would still be served like this where it reads `dtype`; the experts' tensors aside."""
        module, frozen, adapter = self.module, self.frozen, self.adapter
        return (
            module.active_adapter in (adapter, [adapter])
            and module.parts.get(adapter) is self.parts
            and not (module.disable_adapters or module.merged_adapters)
            and module._modules["base_layer"] is frozen
            and frozen._parameters["weight"] is self.weight
            and self.weight.dtype == dtype
            and not (frozen._forward_hooks or frozen._forward_pre_hooks or "forward" in frozen.__dict__)
        )


@dataclass(slots=True)
class Stack:
    """What decoding reads of linears that share an input of `dtype`, in the dtype to compute in.

    rows_CI: A of all `places`, [width, I], then the rows of their routers, w_CI; none where one expert serves every
    token. `routers`: the parameters of each. `serving`: what serves where training draws routes. `sources`: the
    tensors that this was made from, but for those of inference mode, and their `versions`. `is_sparse`: a token
    uses fewer experts than there are.
    """

    dtype: torch.dtype
    places: list[Place]
    routers: list[Parameters]
    serving: Serving
    sources: list[Tensor]
    versions: list[int]
    rows_CI: Tensor
    w_CI: Tensor
    width: int
    is_sparse: bool

    @classmethod
    def of(cls, members: list[Any], adapter: str, x: Tensor, here: Pass) -> "Stack":
        """Copies the rows for an input such as `x`; B only where it has another dtype."""
        parts, dtype = members[0].parts[adapter], _choose_dtype(x)
        leaders = () if parts.router.is_static else dict.fromkeys(member.leader_of(adapter) for member in members)
        own, routers = ([m.parameters_of(adapter) for m in modules] for modules in (members, leaders))
        served = [member.tensors_in(adapter, here) for member in members]
        rows = [*(tensors["A"] for tensors in served), *(parts.router.rows(tensors) for tensors in routers)]
        rows_CI = torch.cat([tensor.detach().to(dtype) for tensor in rows])
        read = {id(t): t for tensors in (*own, *routers) for t in tensors.values() if not t.is_inference()}
        # of what is drawn, the mean of products has the rows of all of them
        ranks = parts.shape.ranks if routers else (len(rows[0]),)
        width = sum(ranks) * len(members)
        a_MRI, b_MRO = rows_CI[:width].chunk(len(members)), [tensors["B"].detach().to(dtype) for tensors in served]
        return cls(
            x.dtype,
            [Place.of(*known, ranks) for known in zip(members, repeat(adapter), a_MRI, b_MRO)],
            routers,
            here.serving,
            list(read.values()),
            list(map(_VERSION, read.values())),
            rows_CI,
            rows_CI[width:],
            width,
            bool(routers) and parts.router.top_k < len(ranks),
        )

    def is_unchanged(self, here: Pass) -> bool:
        """Whether it would be made the same now."""
        # runs for each token: a generator would take longer than what it looks at
        for place in self.places:
            if not place.is_unchanged(self.dtype):
                return False
        return list(map(_VERSION, self.sources)) == self.versions and self.serving == here.serving

    def serves(self, x: Tensor) -> bool:
        """Whether it was made for such an input."""
        return x.dtype == self.dtype and self.rows_CI.dtype == _choose_dtype(x)

    def outputs_for(self, x: Tensor, here: Pass) -> dict[str, Tensor]:
        """The outputs of all places, by path."""
        x_TI = x.reshape(-1, x.shape[-1])
        is_single = self.is_sparse and x_TI.shape[0] == 1 and x.device.type == "cpu"
        found = self._serve_one(x_TI, x, here) if is_single else self._serve(x_TI, x, here)
        shape = x.shape[:-1]
        pairs = zip(self.places, found, strict=True)
        return {place.module.path: y_TO.view(*shape, y_TO.shape[1]) for place, y_TO in pairs}

    def _serve(self, x_TI: Tensor, x: Tensor, here: Pass) -> list[Tensor]:
        z_TC = F.linear(x_TI.to(self.rows_CI.dtype), self.rows_CI)
        h_TMR = z_TC[:, : self.width].view(x_TI.shape[0], len(self.places), self.width // len(self.places))
        if self.routers:
            weights_SK, experts_SK = self._choose(z_TC[:, self.width :].to(_widen(x.dtype)), x, here)
            ranks = self.places[0].parts.shape.ranks
            gates_SE = weights_SK.new_zeros(weights_SK.shape[0], len(ranks)).scatter_(1, experts_SK, weights_SK)
            # low precision would start a product this small later than it takes
            gates_SR = (gates_SE @ segments_ER(ranks, gates_SE.dtype, x.device)).to(h_TMR.dtype)
            h_TMR.mul_(gates_SR.view(x_TI.shape[0], len(self.routers), gates_SR.shape[1]))
        outputs = []
        for place, h_TR in zip(self.places, h_TMR.unbind(dim=1), strict=True):
            y_TO = place.compute_frozen(x_TI).to(h_TR.dtype)
            outputs.append(y_TO.addmm_(h_TR, place.b_RO, alpha=place.scale).to(x.dtype))
        return outputs

    def _serve_one(self, x_1I: Tensor, x: Tensor, here: Pass) -> list[Tensor]:
        """As `_serve`, with nothing read of the experts that the only token did not choose."""
        read_1I = x_1I.to(self.rows_CI.dtype)
        weights_NK, experts_NK = self._choose(F.linear(read_1I, self.w_CI), x, here)
        weights, experts = weights_NK.tolist(), experts_NK.tolist()
        outputs = []
        for n, place in enumerate(self.places):
            y_1O = place.compute_frozen(x_1I).to(read_1I.dtype)
            # one router for all of them, or one for each
            place.add_chosen(y_1O, read_1I, weights[n % len(weights)], experts[n % len(weights)])
            outputs.append(y_1O.to(x.dtype))
        return outputs

    def _choose(self, z_TC: Tensor, x: Tensor, here: Pass) -> tuple[Tensor, Tensor]:
        """Weights and experts by the routers' outputs in at least fp32: [T * N, K].

        Row t N + n is the decision of the n-th of N routers for token t.
        """
        parts, num_routers = self.places[0].parts, len(self.routers)
        assert isinstance(parts.router, LinearRouter)
        z_SC = z_TC.reshape(-1, z_TC.shape[1] // num_routers)
        tokens = here.tokens(parts.stream, x, num_routers)
        weights_SK, experts_SK = parts.router.choose(z_SC, self.routers[0], tokens)
        if here.has_padding(parts.stream):
            weights_SK = weights_SK * tokens.valid_T.unsqueeze(1)
        return weights_SK, experts_SK


@dataclass(slots=True)
class Outputs:
    """What linears give for the input that it was `made_from`: by path, taken out by its linear."""

    made_from: Input
    waiting: dict[str, Tensor]


def infer(module: Any, x: Tensor, here: Pass) -> Tensor | None:
    """The output of `mixture.Mixture` `module`, without a graph and a routing; None where it does not join or casts."""
    outputs = here.outputs
    if outputs is not None and module.path in outputs.waiting and outputs.made_from.is_now(x):
        return outputs.waiting.pop(module.path)
    if cast_as_autocast(x) is not x or torch.compiler.is_compiling():
        return None
    stack = _find_kept(module.path, x, here)
    if stack is None:
        adapter = module.find_joined(x)
        if adapter is None:
            return None
        stack = Stack.of(_find_alike(module, adapter, x), adapter, x, here)
        if here.kept is not None:
            here.kept[module.path] = stack
    found = stack.outputs_for(x, here)
    here.outputs = Outputs(Input.of(x), found)
    return found.pop(module.path)


def _find_kept(path: str, x: Tensor, here: Pass) -> Stack | None:
    """What an earlier pass made for the next token of each sequence. A pass looks once for what has changed since."""
    if here.kept is None or x.dim() < 3 or x.shape[-2] != 1:
        return None
    if not here.is_kept_checked:
        for changed in [key for key, stack in here.kept.items() if not stack.is_unchanged(here)]:
            del here.kept[changed]
        here.is_kept_checked = True
    stack = here.kept.get(path)
    return stack if stack is not None and stack.serves(x) else None


def _find_alike(module: Any, adapter: str, x: Tensor) -> list[Any]:
    """Its kin that one decision can be made with: under one rule, they differ in nothing but ranks and K."""
    parts = module.parts[adapter]
    if not (parts.router.is_static or parts.router.is_by_token):
        return [module]
    kin = ((other, other.parts[adapter]) for other in find_members(module, adapter, x))
    alike = (parts.shape.ranks, parts.router.top_k)
    return [other for other, its in kin if (its.shape.ranks, its.router.top_k) == alike]


def _choose_dtype(x: Tensor) -> torch.dtype:
    is_few = x.device.type == "cpu" and x.numel() < FEW * x.shape[-1]
    return _widen(x.dtype) if is_few else x.dtype


@cache
def _widen(dtype: torch.dtype) -> torch.dtype:
    """At least fp32. Kept, since asking torch for each token takes as long as an operator."""
    return torch.promote_types(dtype, torch.float32)
