"""The slots in use sorted by expert: one GEMM for each expert that has any, on contiguous rows of the hidden.

Costs K * rank columns however many experts there are, and a gather and a scatter of rows, so that it wins where R / K
is large. Both products have hand-written gradients. Rows are gathered expert by expert: an expert has a token at most
once, so no temporary is larger than [T, I] or [T, O], even if one expert gets every token.

The numbers of slots per expert are read by the host: one synchronisation per site and pass on an accelerator.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixora.contracts import Kernel
from mixora.kernels.slots import cast_as_autocast, sort_by_expert, without_autocast
from mixora.routing import Routing


@dataclass(frozen=True)
class _Share:
    """What belongs to one expert: rows of the sorted slots, rows of the weights, numbers of the flat hidden."""

    slots: slice
    ranks: slice
    numbers: slice

    def of(self, hidden_F: Tensor) -> Tensor:
        """A view of this expert's hidden: [n, R_e]."""
        return hidden_F[self.numbers].view(-1, self.ranks.stop - self.ranks.start)


@dataclass(frozen=True)
class _Order:
    """N slots sorted by expert. place_N: where they stand in the flattened [T, K]; shares of experts that have any."""

    token_N: Tensor
    place_N: Tensor
    shares: tuple[_Share, ...]


@dataclass(frozen=True)
class _Slots:
    """The hidden [n, R_e] of expert after expert, flat, since ranks may differ: F numbers."""

    hidden_F: Tensor
    order: _Order


class Sorted(Kernel):
    """Slots are those of weight other than 0."""

    def expand(self, x_TI: Tensor, w_RI: Tensor, routing: Routing, bias_R: Tensor | None = None) -> _Slots:
        """W_e x (+ b_e) for the slots in use."""
        order = self._sort(routing)
        return _Slots(_Expand.apply(cast_as_autocast(x_TI), w_RI, bias_R, order.token_N, order.shares), order)

    def share(self, hidden_Tr: Tensor, routing: Routing) -> _Slots:
        """The token's hidden for the slots in use."""
        order = self._sort(routing)
        return _Slots(hidden_Tr.index_select(0, order.token_N).flatten(), order)

    def map(self, function: Callable[[Tensor], Tensor], slots: _Slots) -> _Slots:
        """The slots with `function` applied to each number."""
        return replace(slots, hidden_F=function(slots.hidden_F))

    def contract(self, slots: _Slots, w_RO: Tensor, routing: Routing) -> Tensor:
        """Weighted sum over the experts of each token: [T, O]."""
        order = slots.order
        weight_N = routing.weights_TK.flatten().index_select(0, order.place_N)
        size = (len(routing.weights_TK), w_RO.shape[1])
        return _Contract.apply(cast_as_autocast(slots.hidden_F), weight_N, w_RO, order.token_N, order.shares, size)

    def _sort(self, routing: Routing) -> _Order:
        experts_TK, num_experts = routing.experts_TK, len(self.ranks)
        in_use_TK = torch.where(routing.weights_TK != 0, experts_TK, num_experts)
        place_N, counts_E = sort_by_expert(in_use_TK, num_experts)
        # memory is estimated on the meta device, where nothing has a value: an even load
        even = [experts_TK.numel() // num_experts] * num_experts
        counts = even if experts_TK.is_meta else counts_E.tolist()
        place_N = place_N[: sum(counts)]
        return _Order(place_N // experts_TK.shape[1], place_N, _share_out(counts, self.ranks))


def _share_out(counts: list[int], ranks: tuple[int, ...]) -> tuple[_Share, ...]:
    sizes = (counts, ranks, [count * rank for count, rank in zip(counts, ranks, strict=True)])
    ends = [list(accumulate(size)) for size in sizes]
    slices = [[slice(e - s, e) for s, e in zip(*pair, strict=True)] for pair in zip(sizes, ends, strict=True)]
    return tuple(_Share(*of_expert) for count, *of_expert in zip(counts, *slices, strict=True) if count)


class _Expand(torch.autograd.Function):
    """Hidden of every slot, flat: [F], in the dtype of `x_TI`."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, w_RI: Tensor, bias_R: Tensor | None, token_N: Tensor, shares: tuple[_Share, ...]
    ) -> Tensor:
        ctx.save_for_backward(x_TI, w_RI, token_N)
        ctx.shares, ctx.bias_dtype = shares, None if bias_R is None else bias_R.dtype
        w_RI = w_RI.to(x_TI.dtype)
        hidden_F = x_TI.new_empty(shares[-1].numbers.stop if shares else 0)
        for share in shares:
            x_nI, w_Ir = x_TI.index_select(0, token_N[share.slots]), w_RI[share.ranks].T
            if bias_R is None:
                torch.mm(x_nI, w_Ir, out=share.of(hidden_F))
            else:
                torch.addmm(bias_R[share.ranks].to(x_TI.dtype), x_nI, w_Ir, out=share.of(hidden_F))
        return hidden_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_F: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, w_RI, token_N = ctx.saved_tensors
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        w_dtype, w_RI = w_RI.dtype, w_RI.to(x_TI.dtype)
        # rows of experts without a token stay zero
        dx_TI = torch.zeros_like(x_TI) if needs_x else None
        dw_RI = torch.zeros_like(w_RI) if needs_w else None
        dbias_R = x_TI.new_zeros(len(w_RI)) if needs_bias else None
        with without_autocast(x_TI):
            for share in ctx.shares:
                token_n, dhidden_nr = token_N[share.slots], share.of(dhidden_F)
                if dw_RI is not None:
                    torch.mm(dhidden_nr.T, x_TI.index_select(0, token_n), out=dw_RI[share.ranks])
                if dx_TI is not None:
                    dx_TI.index_add_(0, token_n, dhidden_nr @ w_RI[share.ranks])
                if dbias_R is not None:
                    torch.sum(dhidden_nr, dim=0, out=dbias_R[share.ranks])
        dw_RI = None if dw_RI is None else dw_RI.to(w_dtype)
        return dx_TI, dw_RI, None if dbias_R is None else dbias_R.to(ctx.bias_dtype), None, None


class _Contract(torch.autograd.Function):
    """Weighted sum of the slots of each token, [T, O], in the dtype of the hidden; `weight_N`: weights of the slots."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_F: Tensor,
        weight_N: Tensor,
        w_RO: Tensor,
        token_N: Tensor,
        shares: tuple[_Share, ...],
        size: tuple[int, int],
    ) -> Tensor:
        ctx.save_for_backward(hidden_F, weight_N, w_RO, token_N)
        ctx.shares = shares
        weight_N1, w_RO = weight_N[:, None].to(hidden_F.dtype), w_RO.to(hidden_F.dtype)
        y_TO = hidden_F.new_zeros(size)
        for share in shares:
            gated_nr = share.of(hidden_F) * weight_N1[share.slots]
            y_TO.index_add_(0, token_N[share.slots], gated_nr @ w_RO[share.ranks])
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        hidden_F, weight_N, w_RO, token_N = ctx.saved_tensors
        w_dtype, w_RO = w_RO.dtype, w_RO.to(hidden_F.dtype)
        weight_N1 = weight_N[:, None].to(hidden_F.dtype)
        dhidden_F, dweight_N = torch.empty_like(hidden_F), torch.empty_like(weight_N)
        # rows of experts without a token stay zero
        dw_RO = torch.zeros_like(w_RO) if ctx.needs_input_grad[2] else None
        with without_autocast(hidden_F):
            for share in ctx.shares:
                hidden_nr, weight_n1 = share.of(hidden_F), weight_N1[share.slots]
                dy_nO = dy_TO.index_select(0, token_N[share.slots])
                dgated_nr = dy_nO @ w_RO[share.ranks].T
                if dw_RO is not None:
                    torch.mm((hidden_nr * weight_n1).T, dy_nO, out=dw_RO[share.ranks])
                torch.sum(dgated_nr * hidden_nr, dim=1, dtype=weight_N.dtype, out=dweight_N[share.slots])
                torch.mul(dgated_nr, weight_n1, out=share.of(dhidden_F))
        return dhidden_F, dweight_N, None if dw_RO is None else dw_RO.to(w_dtype), None, None, None
