"""Linears that read the same input, where no one asks for gradients or records: in decoding, above all.

For a few tokens the time goes into the number of operations. So whichever of the linears is called first computes them
all: one product with the rows of their routers and experts, one decision, one multiplication by the gates. These rows
stand side by side in a `Stack`. It lasts as long as the cache of keys and values that it was made for, and is made anew
once a weight has changed in place or another prompt begins. A single token reads the rows of its chosen experts alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixora.contracts import Parameters
from mixora.joining import find_members, weight_of
from mixora.kernels.sorting import cast_as_autocast
from mixora.kernels.stacked import segments_ER
from mixora.parts import Parts
from mixora.passes import Input, Pass, version_of
from mixora.routers.linear import LinearRouter

# on a CPU, products of fewer tokens than this take longer in low precision than in fp32
FEW = 24
Pairs = Iterable[tuple[Tensor, Tensor]]


@dataclass(slots=True)
class Place:
    """One of the linears of a stack, `module`, and what the stack was made for there; b_RO in the stack's dtype."""

    module: Any
    adapter: str
    parts: Parts
    frozen: Any
    weight: Tensor
    b_RO: Tensor

    @classmethod
    def of(cls, module: Any, adapter: str, dtype: torch.dtype) -> "Place":
        """The module as it is now."""
        frozen, b_RO = module.base_layer, module.parameters_of(adapter)["B"].detach()
        return cls(module, adapter, module.parts[adapter], frozen, frozen.weight, b_RO.to(dtype))

    def is_unchanged(self, dtype: torch.dtype) -> bool:
        """Whether the module would still be served like this where it reads `dtype`; tensors aside."""
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
class Sparse:
    """A stack by experts, for a single token that reads those alone which it chose.

    a_ND: all experts of all places, the rows of each flattened. b_ED: by place. first_M1: where those of each begin.
    """

    a_ND: Tensor
    b_ED: list[Tensor]
    first_M1: Tensor
    rank: int


@dataclass(slots=True)
class Stack:
    """What decoding reads of linears that share an input, in the dtype to compute in.

    rows_CI: A of all `places`, [width, I], then the rows of their routers; none where one expert serves every token.
    `routers`: the parameters of each. `sources`: the tensors that this was made from, and their versions. `sparse`:
    the same for a single token, where that is possible.
    """

    places: list[Place]
    routers: list[Parameters]
    sources: list[tuple[Tensor, int]]
    rows_CI: Tensor
    width: int
    scale: float
    sparse: Sparse | None

    @classmethod
    def of(cls, members: list[Any], adapter: str, dtype: torch.dtype) -> "Stack":
        """Copies the rows; B only where it has another dtype."""
        parts, own = members[0].parts[adapter], [member.parameters_of(adapter) for member in members]
        leaders = () if parts.router.is_static else dict.fromkeys(member.leader_of(adapter) for member in members)
        routers = [leader.parameters_of(adapter) for leader in leaders]
        rows = [*(tensors["A"] for tensors in own), *(parts.router.rows(tensors) for tensors in routers)]
        rows_CI = torch.cat([tensor.detach().to(dtype) for tensor in rows])
        places = [Place.of(member, adapter, dtype) for member in members]
        ranks, width, sparse = parts.shape.ranks, sum(parts.shape.ranks) * len(members), None
        if routers and len(set(ranks)) == 1 and parts.router.top_k < len(ranks):
            num_all, b_ED = len(ranks) * len(members), [place.b_RO.view(len(ranks), -1) for place in places]
            first_M1 = torch.arange(0, num_all, len(ranks), device=rows_CI.device).unsqueeze(1)
            sparse = Sparse(rows_CI[:width].view(num_all, -1), b_ED, first_M1, ranks[0])
        read = {id(tensor): tensor for tensors in (*own, *routers) for tensor in tensors.values()}
        sources = [(tensor, version_of(tensor)) for tensor in read.values()]
        return cls(places, routers, sources, rows_CI, width, parts.expert.scale(parts.shape), sparse)

    def serves(self, x: Tensor) -> bool:
        """Whether it would be made the same for `x` now."""
        return (
            self.rows_CI.dtype == _choose_dtype(x)
            and all(place.is_unchanged(x.dtype) for place in self.places)
            and all(version_of(tensor) == version for tensor, version in self.sources)
        )

    def outputs_for(self, x: Tensor, here: Pass) -> dict[str, Tensor]:
        """The outputs of all places, by path."""
        x_TI = x.reshape(-1, x.shape[-1])
        read_TI = x_TI.to(self.rows_CI.dtype)
        is_single = self.sparse is not None and x_TI.shape[0] == 1 and x.device.type == "cpu"
        pairs = self._expand_chosen(read_TI, x, here) if is_single else self._expand(read_TI, x, here)
        outputs = {}
        for place, (h_TR, b_RO) in zip(self.places, pairs, strict=True):
            y_TO = F.linear(x_TI, weight_of(place.frozen), place.frozen.bias)
            if b_RO.dtype == y_TO.dtype:
                y_TO.addmm_(h_TR, b_RO, alpha=self.scale)
            else:
                y_TO.add_(h_TR @ b_RO, alpha=self.scale)
            outputs[place.module.path] = y_TO.view(*x.shape[:-1], y_TO.shape[1])
        return outputs

    def _expand(self, x_TI: Tensor, x: Tensor, here: Pass) -> Pairs:
        """The hidden of all experts times their gates, [T, R], and B, for each place."""
        z_TC = F.linear(x_TI, self.rows_CI)
        h_TMR = z_TC[:, : self.width].view(x_TI.shape[0], len(self.places), -1)
        if self.routers:
            weights_SK, experts_SK = self._choose(z_TC[:, self.width :], x, here)
            ranks = self.places[0].parts.shape.ranks
            gates_SE = weights_SK.new_zeros(weights_SK.shape[0], len(ranks)).scatter_(1, experts_SK, weights_SK)
            gates_SR = gates_SE.to(h_TMR.dtype) @ segments_ER(ranks, h_TMR.dtype, x.device)
            h_TMR.mul_(gates_SR.view(x_TI.shape[0], len(self.routers), -1))
        return zip(h_TMR.unbind(dim=1), [place.b_RO for place in self.places], strict=True)

    def _expand_chosen(self, x_1I: Tensor, x: Tensor, here: Pass) -> Pairs:
        """As `_expand`, of the experts alone that the only token chose."""
        assert self.sparse is not None
        rank, num_places = self.sparse.rank, len(self.places)
        weights_NK, experts_NK = self._choose(F.linear(x_1I, self.rows_CI[self.width :]), x, here)
        experts_MK = experts_NK if len(experts_NK) == num_places else experts_NK.expand(num_places, -1)
        a_ND = self.sparse.a_ND.index_select(0, (experts_MK + self.sparse.first_M1).view(-1))
        h_NKr = F.linear(x_1I, a_ND.view(-1, x_1I.shape[1])).view(num_places, -1, rank)
        h_M1R = (h_NKr * weights_NK.to(x_1I.dtype).unsqueeze(2)).view(num_places, 1, -1)
        chosen = zip(self.sparse.b_ED, experts_MK.unbind(), strict=True)
        b = [b_ED.index_select(0, experts_K).view(h_M1R.shape[2], -1) for b_ED, experts_K in chosen]
        return zip(h_M1R.unbind(), b, strict=True)

    def _choose(self, z_TC: Tensor, x: Tensor, here: Pass) -> tuple[Tensor, Tensor]:
        """Weights and experts, [T * N, K]: row t N + n is the decision of the n-th of N routers for token t."""
        parts, num_routers = self.places[0].parts, len(self.routers)
        assert isinstance(parts.router, LinearRouter)
        z_SC = z_TC.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, z_TC.shape[1] // num_routers)
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
    is_next = x.dim() > 2 and x.shape[-2] == 1
    stack = here.kept.get(module.path) if here.kept is not None and is_next else None
    if stack is None or not stack.serves(x):
        adapter = module.find_joined(x)
        if adapter is None:
            return None
        stack = Stack.of(_find_alike(module, adapter, x), adapter, _choose_dtype(x))
        if here.kept is not None:
            here.kept[module.path] = stack
    found = stack.outputs_for(x, here)
    here.outputs = Outputs(Input.of(x), found)
    return found.pop(module.path)


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
    return torch.promote_types(x.dtype, torch.float32) if is_few else x.dtype
