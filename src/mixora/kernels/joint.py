"""LoRA experts, their routers and the frozen linear in two functions, for all linears that read the same input.

    H, Z = x [A_1; ...; A_n; W_1; ...; W_n]^T          one GEMM: hidden and router outputs of n sites
    y_i  = x W0_i^T + s_i (H_i * (g_i S_i)) B_i        per site, the experts' part added in place

g are the gates [T, E] that any router decides from its outputs Z, S [E, R] spreads them over the ranks. Backward is
written by hand: the gradient of x is handed from site to site and added to in place, and what is kept for it is x
(alive anyway), g, and H of the experts that serve a token. The values are those of `stacked`, but for the order of
additions; with activations in low precision the router's outputs come from the same low-precision GEMM.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mixora.kernels.stacked import Stacked, segments_ER
from mixora.passes.inputs import Input
from mixora.routing import Routing


class Joint(Stacked):
    """As `stacked` wherever the frozen module is no plain linear, or something needs its output."""

    joins = True


@dataclass
class Joined:
    """The products of one input with the rows of all sites that read it.

    `x_TI`: the input as the next site takes it, so that gradients pass from site to site. `hidden` and `outputs`:
    [T, R] and [T, C] by site, the former taken out by their sites. `routings`: by site where the hidden is weighted
    already, scale included.
    """

    made_from: Input
    x_TI: Tensor
    hidden: dict[str, Tensor]
    outputs: dict[str, Tensor]
    routings: dict[str, Routing] = field(default_factory=dict)


def join(x: Tensor, x_TI: Tensor, experts: dict[str, Tensor], routers: dict[str, Tensor], dropout: float) -> Joined:
    """Multiply `x`, flattened and in the dtype to compute in, with the rows of experts [R, I] and routers [C, I].

    `dropout` acts on what the experts read, with one mask for all sites.
    """
    rows = (*experts.values(), *routers.values())
    tail_TI, *found = _Expand.apply(x_TI, sum(map(len, experts.values())), dropout, *rows)
    hidden = dict(zip(experts, found, strict=False))
    # a trace keeps them; as views they would keep the hidden of all sites too
    outputs = {path: z_TC.clone() for path, z_TC in zip(routers, found[len(experts) :], strict=True)}
    return Joined(Input.of(x), hand_on(x_TI, tail_TI), hidden, outputs)


def contract(
    joined: Joined,
    path: str,
    routing: Routing | None,
    ranks: tuple[int, ...],
    b_RO: Tensor,
    scale: float,
    weight_OI: Tensor,
    bias_O: Tensor | None,
) -> Tensor:
    """The whole output of the site at `path`: [T, O]. Without routing, the one expert there serves every token."""
    x_TI, h_TR = joined.x_TI, joined.hidden.pop(path)
    segments = segments_ER(ranks, x_TI.dtype, x_TI.device)
    b_RO = b_RO.to(x_TI.dtype)
    gates_TE = None if routing is None else routing.gates_TE()
    chosen_TK = routing.experts_TK if routing is not None and _are_few_chosen(routing, ranks) else None
    y_TO, tail_TI = _Contract.apply(x_TI, h_TR, gates_TE, chosen_TK, b_RO, segments, weight_OI, bias_O, scale)
    joined.x_TI = hand_on(x_TI, tail_TI)
    return y_TO


def hand_on(x_TI: Tensor, tail_TI: Tensor) -> Tensor:
    """The input for the next site: `tail_TI`, a function's own output of it, only where a gradient has to come back."""
    return tail_TI if x_TI.requires_grad else x_TI


def _are_few_chosen(routing: Routing, ranks: tuple[int, ...]) -> bool:
    """Whether the hidden of the chosen experts is a block of fixed size, at most half of all."""
    return len(set(ranks)) == 1 and 2 * routing.experts_TK.shape[1] <= len(ranks)


class _Expand(torch.autograd.Function):
    """x -> x, then x times the rows of each matrix; the first `experts` rows of all read x with dropout."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, experts: int, dropout: float, *matrices: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rows_CI, mask_TI = torch.cat(matrices).to(x_TI.dtype), None
        if dropout:
            mask_TI = torch.empty(x_TI.shape, dtype=torch.bool, device=x_TI.device).bernoulli_(1 - dropout)
            z_TC = x_TI.new_empty(len(x_TI), len(rows_CI))
            torch.mm(_drop(x_TI, mask_TI, dropout), rows_CI[:experts].T, out=z_TC[:, :experts])
            torch.mm(x_TI, rows_CI[experts:].T, out=z_TC[:, experts:])
        else:
            z_TC = x_TI @ rows_CI.T
        # the rows in one matrix, cast, are a copy that need not live until backward
        ctx.save_for_backward(x_TI, mask_TI, *matrices)
        ctx.experts, ctx.dropout = experts, dropout
        ctx.sizes, ctx.dtypes = [len(matrix) for matrix in matrices], [matrix.dtype for matrix in matrices]
        return x_TI.view_as(x_TI), *z_TC.split(ctx.sizes, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TI: Tensor | None, *pieces: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TI, mask_TI, *matrices = ctx.saved_tensors
        rows_CI = torch.cat(matrices).to(x_TI.dtype)
        filled = [
            x_TI.new_zeros(len(x_TI), size) if piece is None else piece.to(x_TI.dtype)
            for piece, size in zip(pieces, ctx.sizes, strict=True)
        ]
        dz_TC, n = torch.cat(filled, dim=1), ctx.experts
        if mask_TI is None:
            drows_CI = dz_TC.T @ x_TI
            dx_TI = add_product(dx_TI, dz_TC, rows_CI) if ctx.needs_input_grad[0] else None
        else:
            drows_CI = torch.cat([dz_TC[:, :n].T @ _drop(x_TI, mask_TI, ctx.dropout), dz_TC[:, n:].T @ x_TI])
            if ctx.needs_input_grad[0]:
                through_TI = _drop(dz_TC[:, :n] @ rows_CI[:n], mask_TI, ctx.dropout)
                through_TI = through_TI if dx_TI is None else dx_TI.add_(through_TI)
                dx_TI = through_TI.addmm_(dz_TC[:, n:], rows_CI[n:])
        parts = zip(pieces, drows_CI.split(ctx.sizes), ctx.dtypes, strict=True)
        # what nothing was made of has no gradient, as if it had not been multiplied
        return dx_TI, None, None, *(None if piece is None else part.to(dtype) for piece, part, dtype in parts)


class _Contract(torch.autograd.Function):
    """(x, hidden, gates) -> (y, x)."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        h_TR: Tensor,
        gates_TE: Tensor | None,
        chosen_TK: Tensor | None,
        b_RO: Tensor,
        segments_ER: Tensor,
        weight_OI: Tensor,
        bias_O: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.scale = scale
        y_TO = F.linear(x_TI, weight_OI.to(x_TI.dtype), None if bias_O is None else bias_O.to(x_TI.dtype))
        y_TO.addmm_(_weigh(h_TR, _spread(gates_TE, segments_ER, scale)), b_RO)
        kept, places = (h_TR, None) if chosen_TK is None else _take(h_TR, chosen_TK, len(segments_ER))
        ctx.save_for_backward(kept, places, gates_TE, b_RO, segments_ER, weight_OI)
        return y_TO, x_TI.view_as(x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor | None, dx_TI: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy_TO is None:
            return dx_TI, *[None] * 8
        kept, places, gates_TE, b_RO, segments_ER, weight_OI = ctx.saved_tensors
        h_TR = kept if places is None else _put(kept, places, len(segments_ER))
        # of the scaled gates, as each rank saw them
        gate_TR, dweighted_TR, dgates_TE = _spread(gates_TE, segments_ER, ctx.scale), dy_TO @ b_RO.T, None
        db_RO = _weigh(h_TR, gate_TR).T @ dy_TO if ctx.needs_input_grad[4] else None
        if ctx.needs_input_grad[2]:
            dgates_TE = ((h_TR * dweighted_TR) @ segments_ER.T).to(gates_TE.dtype) * ctx.scale
        dh_TR = _weigh(dweighted_TR, gate_TR)
        if ctx.needs_input_grad[0]:
            dx_TI = add_product(dx_TI, dy_TO, weight_OI.to(dy_TO.dtype))
        return dx_TI, dh_TR, dgates_TE, None, db_RO, None, None, None, None


def _take(h_TR: Tensor, chosen_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """The hidden of the chosen experts, and where it stood among all: [T, K, rank] both."""
    h_TEr = h_TR.view(len(h_TR), experts, h_TR.shape[1] // experts)
    places_TKr = chosen_TK[..., None].expand(-1, -1, h_TEr.shape[2])
    return h_TEr.gather(1, places_TKr), places_TKr


def _put(kept_TKr: Tensor, places_TKr: Tensor, experts: int) -> Tensor:
    """Back in their places, 0 where the gate is 0 anyway: [T, R]."""
    tokens, _, rank = kept_TKr.shape
    return kept_TKr.new_zeros(tokens, experts, rank).scatter_(1, places_TKr, kept_TKr).view(tokens, experts * rank)


def _spread(gates_TE: Tensor | None, segments_ER: Tensor, scale: float) -> Tensor | float:
    """scale * the gate of its expert for each rank: exact, since each column of the segments holds a single 1."""
    return scale if gates_TE is None else (gates_TE * scale).to(segments_ER.dtype) @ segments_ER


def _weigh(h_TR: Tensor, gate_TR: Tensor | float) -> Tensor:
    return h_TR if isinstance(gate_TR, float) and gate_TR == 1 else h_TR * gate_TR


def add_product(sum_TI: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """sum + left right, in place: sums are made by the functions above and seen by no one else."""
    return left @ right if sum_TI is None else sum_TI.addmm_(left, right)


def _drop(x_TI: Tensor, mask_TI: Tensor, dropout: float) -> Tensor:
    return (x_TI * mask_TI).mul_(1 / (1 - dropout))
