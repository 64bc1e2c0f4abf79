"""Linears that read the same input, computed together with their experts and routers (see `kernels.joint`).

Whichever of them is called first makes the products for all; each takes its own when it is called. A pass keeps what
waits, so nothing stands on a layer, and a recomputed layer makes its products anew.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mixora.host.sharding import is_sharded
from mixora.kernels import triton
from mixora.kernels.joint import Joined, contract, join
from mixora.kernels.sorting import cast_as_autocast
from mixora.passes import Pass
from mixora.routing import Routing

logger = logging.getLogger("mixora")


def find_obstacle(frozen: nn.Module, x: Tensor) -> str | None:
    """Why a frozen module has to be called as it is; None where its weight can be used instead."""
    if type(frozen) not in (nn.Linear, Conv1D):
        return f"is a {type(frozen).__name__}"
    if frozen._forward_hooks or frozen._forward_pre_hooks or frozen._backward_hooks or "forward" in frozen.__dict__:
        return "is sharded" if any(map(is_sharded, frozen.parameters(recurse=False))) else "has hooks"
    weight: Any = frozen.weight
    if weight.requires_grad or (frozen.bias is not None and frozen.bias.requires_grad):
        return "is trained"
    if is_sharded(weight):
        return "is sharded"
    if type(weight) not in (nn.Parameter, Tensor):
        return f"has a weight of type {type(weight).__name__}"
    if cast_as_autocast(x).dtype != weight.dtype and x.dtype != weight.dtype:
        return f"is in {weight.dtype} and reads {x.dtype}"
    return "is being compiled" if torch.compiler.is_compiling() else None


def warn_once(module: Any, obstacle: str, kernel: str = "stacked") -> None:
    """Say in the log why `kernel` takes the place of a module's own."""
    # a compiler would cut its graph in two for the log
    if module.obstacle != obstacle and not torch.compiler.is_compiling():
        module.obstacle = obstacle
        logger.info("%s: %s, so kernel %r computes its experts", module.path, obstacle, kernel)


def compute(module: Any, adapter: str, x: Tensor, here: Pass) -> tuple[Tensor, Routing]:
    """What `mixture.Mixture` `module` gives for `x`, frozen part included, and the routing of its experts."""
    parts, frozen = module.parts[adapter], module.base_layer
    joined = _find_products(module, adapter, x, here)
    weighted = joined.routings.get(module.path)
    routing = weighted or module.route(adapter, x, here, joined.outputs.get(module.leader_of(adapter).path))
    y_TO = contract(
        joined,
        module.path,
        None if parts.router.is_static or weighted else routing,
        parts.shape.ranks,
        module.tensors_in(adapter, here)["B"],
        1.0 if weighted else parts.expert.scale(parts.shape),
        _weight_of(frozen),
        frozen.bias,
    )
    return y_TO.view(*x.shape[:-1], y_TO.shape[-1]), routing


def _weight_of(frozen: Any) -> Tensor:
    """That of a frozen linear without obstacle: [O, I]."""
    return frozen.weight.T if isinstance(frozen, Conv1D) else frozen.weight


def _find_products(module: Any, adapter: str, x: Tensor, here: Pass) -> Joined:
    joined = here.joined.get(adapter)
    waits = joined is not None and module.path in joined.hidden
    if joined is not None and waits and joined.made_from.is_now(x):
        return joined
    # what waits was made from something else: these linears do not read one input here
    members = [module] if waits else find_members(module, adapter, x)
    here.joined[adapter] = joined = _multiply(members, adapter, x, here)
    return joined


def find_members(module: Any, adapter: str, x: Tensor) -> list[Any]:
    """`module` and those of its kin that can join where they read `x`."""
    return [kin for kin in module.parts[adapter].kin if kin is module or kin.can_join(adapter, x)]


def _multiply(members: list[Any], adapter: str, x: Tensor, here: Pass) -> Joined:
    experts, routers, x_TI = {}, {}, cast_as_autocast(x).reshape(-1, x.shape[-1])
    first, expert = members[0], members[0].parts[adapter].expert
    dropout = expert.config.dropout if first.training else 0.0
    if isinstance(first.parts[adapter].kernel, triton.Triton):
        obstacle = _find_obstacle_to_routing(first, adapter, x, x_TI, dropout)
        if obstacle is None:
            return _shrink(members, adapter, x, x_TI, here)
        warn_once(first, obstacle, "joint")
    for member in members:
        parts, leader = member.parts[adapter], member.leader_of(adapter)
        experts[member.path] = member.tensors_in(adapter, here)["A"]
        # where only autocast computes in low precision, routers keep theirs and multiply by themselves
        if not parts.router.is_static and x_TI.dtype == x.dtype:
            routers[leader.path] = parts.router.rows(leader.parameters_of(adapter))
    return join(x, x_TI, experts, routers, dropout)


def _find_obstacle_to_routing(module: Any, adapter: str, x: Tensor, x_TI: Tensor, dropout: float) -> str | None:
    """Why routing cannot be part of the launch that multiplies; None where it can."""
    router = module.parts[adapter].router
    if router.is_static or not router.is_plain(module.training):
        return "its router is not softmax and top-k alone"
    if dropout:
        return "its experts' input has dropout"
    if x_TI.dtype != x.dtype:
        return f"autocast computes in {x_TI.dtype}, routers in {x.dtype}"
    return triton.find_obstacle(x_TI)


def _shrink(members: list[Any], adapter: str, x: Tensor, x_TI: Tensor, here: Pass) -> Joined:
    terms = []
    for member in members:
        parts, leader = member.parts[adapter], member.leader_of(adapter)
        rows = member.parameters_of(adapter)["A"], parts.router.rows(leader.parameters_of(adapter))
        terms.append(
            triton.Term(member.path, *rows, parts.shape.ranks, parts.router.top_k, parts.expert.scale(parts.shape))
        )
    tokens = here.tokens(members[0].parts[adapter].stream, x)
    return triton.shrink(x, x_TI, terms, tokens.valid_T, members[0].parts[adapter].router.config.renormalise)
