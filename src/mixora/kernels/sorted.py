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

from mixora.host.devices import without_autocast
from mixora.kernels.sorting import SortingKernel, cast_as_autocast, sort_by_expert
from mixora.routing import Routing


@dataclass(frozen=True)
class _Sizes:
    """Slots and rank of each expert."""

    counts: list[int]
    ranks: tuple[int, ...]

    @property
    def numbers(self) -> list[int]:
        """How many numbers the hidden of each expert has."""
        return [count * rank for count, rank in zip(self.counts, self.ranks, strict=True)]

    @property
    def rows(self) -> list[slice]:
        """Where each expert's ranks stand among all."""
        return [slice(end - rank, end) for rank, end in zip(self.ranks, accumulate(self.ranks), strict=True)]

    def new_gradient(self, w_RX: Tensor) -> Tensor:
        """Room for the gradient of all experts' rows, 0 for experts without a slot."""
        dw_RX = torch.empty_like(w_RX)
        for rows, count in zip(self.rows, self.counts, strict=True):
            if not count:
                dw_RX[rows] = 0
        return dw_RX

    def split(self, hidden_F: Tensor) -> list[Tensor]:
        """Views of each expert's hidden: [n, R_e]."""
        parts = zip(hidden_F.split(self.numbers), self.counts, self.ranks, strict=True)
        return [hidden_f.view(count, rank) for hidden_f, count, rank in parts]


@dataclass(frozen=True)
class _Slots:
    """The hidden [n, R_e] of expert after expert, flat, since ranks may differ: F numbers.

    place_N: where the sorted slots stand in the flattened [T, K].
    """

    hidden_F: Tensor
    token_N: Tensor
    place_N: Tensor
    sizes: _Sizes


class Sorted(SortingKernel):
    """Slots are those of weight other than 0."""

    def expand(self, x_TI: Tensor, w_RI: Tensor, routing: Routing, bias_R: Tensor | None = None) -> _Slots:
        """W_e x (+ b_e) for the slots in use."""
        token_N, place_N, sizes = self._sort(routing)
        hidden_F = _Expand.apply(cast_as_autocast(x_TI), w_RI, bias_R, token_N, sizes)
        return _Slots(hidden_F, token_N, place_N, sizes)

    def share(self, hidden_Tr: Tensor, routing: Routing) -> _Slots:
        """The token's hidden for the slots in use."""
        token_N, place_N, sizes = self._sort(routing)
        return _Slots(hidden_Tr.index_select(0, token_N).flatten(), token_N, place_N, sizes)

    def map(self, function: Callable[[Tensor], Tensor], slots: _Slots) -> _Slots:
        """The slots with `function` applied to each number."""
        return replace(slots, hidden_F=function(slots.hidden_F))

    def contract(self, slots: _Slots, w_RO: Tensor, routing: Routing) -> Tensor:
        """Weighted sum over the experts of each token: [T, O]."""
        weight_N = routing.weights_TK.flatten().index_select(0, slots.place_N)
        hidden_F, count = cast_as_autocast(slots.hidden_F), len(routing.weights_TK)
        return _Contract.apply(hidden_F, weight_N, w_RO, slots.token_N, slots.sizes, count)

    def _sort(self, routing: Routing) -> tuple[Tensor, Tensor, _Sizes]:
        """Token and place of the N slots in use, and what each expert has of them."""
        experts_TK, num_experts = routing.experts_TK, len(self.ranks)
        in_use_TK = torch.where(routing.weights_TK != 0, experts_TK, num_experts)
        place_N, counts_E = sort_by_expert(in_use_TK, num_experts)
        # memory is estimated on the meta device, where nothing has a value: an even load
        even = [experts_TK.numel() // num_experts] * num_experts
        counts = even if experts_TK.is_meta else counts_E.tolist()
        place_N = place_N[: sum(counts)]
        return place_N // experts_TK.shape[1], place_N, _Sizes(counts, self.ranks)


class _Expand(torch.autograd.Function):
    """Hidden of every slot, flat: [F], in the dtype of `x_TI`."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_RI: Tensor, bias_R: Tensor | None, token_N: Tensor, sizes: _Sizes) -> Tensor:
        ctx.save_for_backward(x_TI, w_RI, token_N)
        ctx.sizes, ctx.bias_dtype = sizes, None if bias_R is None else bias_R.dtype
        hidden_F = x_TI.new_empty(sum(sizes.numbers))
        biases = [None] * len(sizes.ranks) if bias_R is None else bias_R.to(x_TI.dtype).split(sizes.ranks)
        parts = zip(token_N.split(sizes.counts), sizes.split(hidden_F), w_RI.split(sizes.ranks), biases, strict=True)
        for token_n, hidden_nr, w_rI, bias_r in parts:
            if not len(token_n):
                continue
            x_nI, w_Ir = x_TI.index_select(0, token_n), w_rI.to(x_TI.dtype).T
            if bias_r is None:
                torch.mm(x_nI, w_Ir, out=hidden_nr)
            else:
                torch.addmm(bias_r, x_nI, w_Ir, out=hidden_nr)
        return hidden_F

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhidden_F: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, w_RI, token_N = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        needs_x, needs_w, needs_bias = ctx.needs_input_grad[:3]
        dx_TI = torch.zeros_like(x_TI) if needs_x else None
        dw_RI = sizes.new_gradient(w_RI) if needs_w else None
        dbias_R = x_TI.new_zeros(len(w_RI)) if needs_bias else None
        per_rank = (w_RI.split(sizes.ranks), sizes.rows)
        parts = zip(token_N.split(sizes.counts), sizes.split(dhidden_F.contiguous()), *per_rank, strict=True)
        with without_autocast(x_TI):
            for token_n, dhidden_nr, w_rI, rows in parts:
                if not len(token_n):
                    continue
                if dx_TI is not None:
                    dx_TI.index_add_(0, token_n, dhidden_nr @ w_rI.to(x_TI.dtype))
                if dw_RI is not None:
                    _multiply_into(dw_RI[rows], dhidden_nr.T, x_TI.index_select(0, token_n))
                if dbias_R is not None:
                    torch.sum(dhidden_nr, dim=0, out=dbias_R[rows])
        return dx_TI, dw_RI, None if dbias_R is None else dbias_R.to(ctx.bias_dtype), None, None


class _Contract(torch.autograd.Function):
    """Weighted sum of the slots of each token, [T, O], in the dtype of the hidden; `weight_N`: weights of the slots."""

    @staticmethod
    def forward(
        ctx: Any, hidden_F: Tensor, weight_N: Tensor, w_RO: Tensor, token_N: Tensor, sizes: _Sizes, count: int
    ) -> Tensor:
        ctx.save_for_backward(hidden_F, weight_N, w_RO, token_N)
        ctx.sizes = sizes
        y_TO = hidden_F.new_zeros(count, w_RO.shape[1])
        slots = (token_N.split(sizes.counts), weight_N[:, None].to(hidden_F.dtype).split(sizes.counts))
        parts = zip(*slots, sizes.split(hidden_F), w_RO.split(sizes.ranks), strict=True)
        for token_n, weight_n1, hidden_nr, w_rO in parts:
            if len(token_n):
                y_TO.index_add_(0, token_n, (hidden_nr * weight_n1) @ w_rO.to(hidden_F.dtype))
        return y_TO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:
        hidden_F, weight_N, w_RO, token_N = ctx.saved_tensors
        sizes: _Sizes = ctx.sizes
        dhidden_F, dweight_N = torch.empty_like(hidden_F), torch.empty_like(weight_N)
        dw_RO = sizes.new_gradient(w_RO) if ctx.needs_input_grad[2] else None
        per_slot = [t.split(sizes.counts) for t in (token_N, weight_N[:, None].to(hidden_F.dtype), dweight_N)]
        per_rank = (w_RO.split(sizes.ranks), sizes.rows)
        parts = zip(*per_slot, sizes.split(hidden_F), sizes.split(dhidden_F), *per_rank, strict=True)
        with without_autocast(hidden_F):
            for token_n, weight_n1, dweight_n, hidden_nr, dhidden_nr, w_rO, rows in parts:
                if not len(token_n):
                    continue
                dy_nO = dy_TO.index_select(0, token_n)
                dgated_nr = dy_nO @ w_rO.to(hidden_F.dtype).T
                torch.mul(dgated_nr, weight_n1, out=dhidden_nr)
                torch.sum(dgated_nr.mul_(hidden_nr), dim=1, dtype=weight_N.dtype, out=dweight_n)
                if dw_RO is not None:
                    _multiply_into(dw_RO[rows], torch.mul(hidden_nr, weight_n1, out=dgated_nr).T, dy_nO)
        return dhidden_F, dweight_N, dw_RO, None, None, None


def _multiply_into(product: Tensor, left: Tensor, right: Tensor) -> None:
    """left right, in the dtype of `product`."""
    if product.dtype == left.dtype:
        torch.mm(left, right, out=product)
    else:
        product.copy_(left @ right)
