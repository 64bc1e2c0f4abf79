"""The slots of a feed-forward part whose experts go through all of it: K hidden states of each token, one per expert.

They stand below each other along the first dimension, [K * B, ..., F], all first choices before all second ones, and
so pass through whatever a model does between its linears, token by token.
"""

from collections.abc import Set
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixora.errors import ModelError
from mixora.passes import Shared
from mixora.routing import Routing


def find_routing(shared: Shared | None, leader: str, firsts: Set[str], path: str, x: Tensor) -> Routing:
    """The routing by which the linears `firsts` have made the slots `x`, which the part's last linear at `path` reads.

    `shared`: the last routing of this pass. Raises `ModelError` where it was not made for this part by all of them.
    """
    if shared is None or shared.path != leader or shared.readers != firsts:
        raise ModelError(
            f"{path}: ends a feed-forward part, but {', '.join(sorted(firsts))} did not all read one input before it "
            "in this pass; valid: a forward pass of the whole model, in which they do"
        )
    tokens, slots = shared.routing.experts_TK.shape
    if x.shape[:-1].numel() != tokens * slots:
        raise ModelError(
            f"{path}: got a hidden state of shape {list(x.shape)}, where the feed-forward part began with {slots} "
            f"slots for each of {tokens} tokens; valid: a part that changes tokens one by one"
        )
    return shared.routing


def spread(y: Tensor, delta_SO: Tensor, slots: int) -> Tensor:
    """`y` [B, ..., O] in each slot, plus what the slots have of their own, which is overwritten: [K * B, ..., O]."""
    return _Spread.apply(delta_SO, y.reshape(-1, y.shape[-1]), slots).view(slots * len(y), *y.shape[1:])


class _Spread(torch.autograd.Function):
    """In place: memory that is new costs more than the sum, and autograd would copy where a view is changed."""

    @staticmethod
    def forward(ctx: Any, delta_SO: Tensor, y_TO: Tensor, slots: int) -> Tensor:
        ctx.mark_dirty(delta_SO)
        ctx.size = (slots, *y_TO.shape)
        delta_SO.view(ctx.size).add_(y_TO)
        return delta_SO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dspread_SO: Tensor) -> tuple[Tensor, Tensor | None, None]:
        # one after the other: as a sum over so few rows far apart it takes many times as long in low precision
        dy_TO = reduce(torch.add, dspread_SO.reshape(ctx.size)) if ctx.needs_input_grad[1] else None
        return dspread_SO, dy_TO, None


def mix(x: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The slots [K * B, ..., F] of each token, weighted: [B, ..., F]; and the slots for what else reads them, [K T, F].

    The weights sum to 1. As the first slot plus weighted differences, equal slots give exactly what one of them holds,
    and a token without weights keeps its first. The gradient of what is read elsewhere is added to in place.
    """
    tokens, slots = routing.experts_TK.shape
    weights_KT1 = routing.weights_TK.T[..., None].to(x.dtype)
    mixed_TF, x_KTF = _Mix.apply(x.reshape(slots, tokens, x.shape[-1]), weights_KT1)
    return mixed_TF.reshape(len(x) // slots, *x.shape[1:]), x_KTF.flatten(0, 1)


class _Mix(torch.autograd.Function):
    """Hand-written, since K times the hidden is much: one temporary [T, F], whatever K is."""

    @staticmethod
    def forward(ctx: Any, x_KTF: Tensor, weights_KT1: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x_KTF, weights_KT1)
        mixed_TF, apart_TF = x_KTF[0].clone(), torch.empty_like(x_KTF[0])
        for x_TF, weights_T1 in zip(x_KTF[1:], weights_KT1[1:], strict=True):
            mixed_TF.addcmul_(weights_T1, torch.sub(x_TF, x_KTF[0], out=apart_TF))
        return mixed_TF, x_KTF.view_as(x_KTF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dmixed_TF: Tensor | None, dx_KTF: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if dmixed_TF is None:
            return dx_KTF, None
        x_KTF, weights_KT1 = ctx.saved_tensors
        dx_KTF = torch.zeros_like(x_KTF) if dx_KTF is None else dx_KTF
        dweights_KT1, product_TF = torch.zeros_like(weights_KT1), torch.empty_like(dmixed_TF)
        dx_KTF[0].addcmul_(1 - weights_KT1[1:].sum(dim=0), dmixed_TF)
        for k in range(1, len(x_KTF)):
            torch.sub(x_KTF[k], x_KTF[0], out=product_TF)
            torch.sum(product_TF.mul_(dmixed_TF), dim=-1, keepdim=True, out=dweights_KT1[k])
            dx_KTF[k].addcmul_(weights_KT1[k], dmixed_TF)
        return dx_KTF, dweights_KT1
