"""As `joint`, with routers that are softmax and top-k computed in the launch that multiplies x with all rows.

    H, Z = x [A_1; ...; A_n; W_1; ...; W_n]^T,  p = softmax(Z),  g = p on the K largest of a site, renormalised or not
    hidden_i = s_i H_i * (g_i S_i)                                                                one launch
    y_i = x W0_i^T + hidden_i B_i                                                                 torch, as in `joint`

Backward mirrors it: one launch from d hidden, H and g to dH and dZ, products by torch around it. Softmax and gates are
fp32, from sums in fp32 of products of numbers in the activations' dtype. Other routers, dropout on the experts' input,
float64 and inference are computed as `joint` does.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mixora.contracts import Shape
from mixora.host.devices import is_triton_interpreted
from mixora.kernels.joint import Joined, Joint, add_product, hand_on
from mixora.passes.inputs import Input
from mixora.routing import Routing

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# what a program holds at once: tokens, bytes of a row of x, the most columns of hidden
TOKENS, BYTES, MOST_RANKS = 64, 128, 128
# the fewest rows or columns of a product on the device
FEWEST = 16


class Triton(Joint):
    """Needs Triton, and an NVIDIA GPU or Triton's interpreter. Not tried on a GPU yet."""

    @classmethod
    def objection(cls, shape: Shape, dtype: torch.dtype) -> str | None:
        """Float64, no Triton, nothing to run it on."""
        if dtype not in DTYPES:
            return f"cannot compute in {dtype}; valid: {', '.join(map(str, DTYPES))}"
        if importlib.util.find_spec("triton") is None:
            return "needs the package triton, which is not installed"
        if torch.version.hip or not (torch.cuda.is_available() or is_triton_interpreted()):
            return "needs an NVIDIA GPU, and there is none"
        return None


def find_obstacle(x_TI: Tensor) -> str | None:
    """Why a launch cannot read such a tensor."""
    if x_TI.dtype not in DTYPES:
        return f"its input is in {x_TI.dtype}"
    if x_TI.device.type == "cuda" or (x_TI.device.type == "cpu" and is_triton_interpreted()):
        return None
    return f"its input is on {x_TI.device.type}"


@dataclass(frozen=True)
class Term:
    """One site: the rows of its experts and of the router it uses, and the factor s of its sum over experts."""

    path: str
    a_RI: Tensor
    w_EI: Tensor
    ranks: tuple[int, ...]
    top_k: int
    scale: float


def shrink(x: Tensor, x_TI: Tensor, terms: Sequence[Term], valid_T: Tensor, renormalise: bool) -> Joined:
    """The weighted hidden of all sites and their routings for the input `x`, `x_TI` where flattened.

    `valid_T`: bool, False on padding, which gets weight 0. `renormalise`: the weights of a token sum to 1.
    """
    count, layout = len(terms), _Layout.of(terms)
    rows = [*(term.a_RI for term in terms), *(term.w_EI for term in terms)]
    tail_TI, *found = _Shrink.apply(x_TI, valid_T, layout, renormalise, *rows)
    hidden, logits, probs, weights, experts = (found[n * count : (n + 1) * count] for n in range(5))
    paths = [term.path for term in terms]
    joined = Joined(Input.of(x), hand_on(x_TI, tail_TI), dict(zip(paths, hidden, strict=True)), {})
    for path, experts_TK, weights_TK, z_TE, p_TE in zip(paths, experts, weights, logits, probs, strict=True):
        # not "> 0": what is not a number must show
        used_TK = weights_TK != 0
        joined.routings[path] = Routing(experts_TK, weights_TK, used_TK, used_TK, valid_T, z_TE.shape[1], z_TE, p_TE)
    return joined


@dataclass(frozen=True)
class _Layout:
    """Where the columns of each site stand."""

    ranks: tuple[tuple[int, ...], ...]
    slots: tuple[int, ...]
    scales: tuple[float, ...]

    @classmethod
    def of(cls, terms: Sequence[Term]) -> "_Layout":
        return cls(tuple(t.ranks for t in terms), tuple(t.top_k for t in terms), tuple(t.scale for t in terms))

    @property
    def widths(self) -> list[int]:
        return [sum(ranks) for ranks in self.ranks]

    @property
    def experts(self) -> list[int]:
        return [len(ranks) for ranks in self.ranks]

    @property
    def blocks(self) -> dict[str, int]:
        """How many columns of hidden, router outputs and slots a program holds at once."""
        ranks, experts, slots = (
            1 << (max(found) - 1).bit_length() for found in (self.widths, self.experts, self.slots)
        )
        return {"R": min(max(ranks, FEWEST), MOST_RANKS), "E": max(experts, FEWEST), "K": slots}

    def tables(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """For each program along the columns, of at most `step`: where it works (see `launches`), and its scale."""
        rows, scales = [], []
        first, first_z, first_k = 0, 0, 0
        for width, experts, slots, scale in zip(self.widths, self.experts, self.slots, self.scales, strict=True):
            for start in range(0, width, step):
                mine = [first + start, min(step, width - start)]
                rows.append([*mine, first_z, experts, first_k, slots, int(start == 0)])
                scales.append(scale)
            first, first_z, first_k = first + width, first_z + experts, first_k + slots
        return torch.tensor(rows, dtype=torch.int32, device=device), torch.tensor(scales, device=device)


@dataclass(frozen=True)
class _Tables:
    """On the device: programs of both launches, and the expert of each column within its site."""

    forward: tuple[Tensor, Tensor]
    backward: tuple[Tensor, Tensor]
    expert_R: Tensor


@cache
def _tables_for(layout: _Layout, device: torch.device) -> _Tables:
    """A model has few different layouts: they are kept."""
    experts = [expert for ranks in layout.ranks for expert, rank in enumerate(ranks) for _ in range(rank)]
    with torch.inference_mode(False):
        forward, backward = (layout.tables(step, device) for step in (layout.blocks["R"], max(layout.widths)))
        return _Tables(forward, backward, torch.tensor(experts, dtype=torch.int32, device=device))


class _Shrink(torch.autograd.Function):
    """x -> x; for each site the weighted hidden; Z; p; weights; experts. Rows: A of all sites, then W of all."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, valid_T: Tensor, layout: _Layout, renormalise: bool, *matrices: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        rows_CI, read_TI = torch.cat(matrices).to(x_TI.dtype), x_TI.contiguous()
        tokens, width = read_TI.shape
        ranks, experts, slots = sum(layout.widths), sum(layout.experts), sum(layout.slots)
        h_TR, gated_TR = (read_TI.new_empty(tokens, ranks) for _ in range(2))
        z_TE, p_TE = (read_TI.new_empty(tokens, experts, dtype=torch.float32) for _ in range(2))
        weights_TK = read_TI.new_empty(tokens, slots, dtype=torch.float32)
        experts_TK = read_TI.new_empty(tokens, slots, dtype=torch.int64)
        tables = _tables_for(layout, x_TI.device)
        table, scales = tables.forward
        outputs = (h_TR, gated_TR, z_TE, p_TE, weights_TK, experts_TK)
        _launch(
            "shrink",
            (len(table), tokens),
            (read_TI, rows_CI, valid_T.contiguous().view(torch.uint8), table, scales, tables.expert_R, *outputs),
            (tokens, width, ranks, experts, slots),
            RENORMALISE=renormalise,
            IN=BYTES // x_TI.element_size(),
            **layout.blocks,
        )
        ctx.save_for_backward(read_TI, rows_CI, h_TR, p_TE, weights_TK, experts_TK)
        ctx.layout, ctx.renormalise, ctx.dtypes = layout, renormalise, [matrix.dtype for matrix in matrices]
        chosen = experts_TK.split(layout.slots, dim=1)
        ctx.mark_non_differentiable(*chosen)
        hidden, weights = gated_TR.split(layout.widths, dim=1), weights_TK.split(layout.slots, dim=1)
        decided = (z.split(layout.experts, dim=1) for z in (z_TE, p_TE))
        return x_TI.view_as(x_TI), *hidden, *next(decided), *next(decided), *weights, *chosen

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx_TI: Tensor | None, *pieces: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TI, rows_CI, h_TR, p_TE, weights_TK, experts_TK = ctx.saved_tensors
        layout: _Layout = ctx.layout
        count = len(layout.ranks)
        dhidden, dz, dp, dweights = (pieces[n * count : (n + 1) * count] for n in range(4))
        felt = [*(piece is not None for piece in dhidden), *map(_is_any, zip(dhidden, dz, dp, dweights, strict=True))]
        if not any(felt):
            return dx_TI, None, None, None, *(None for _ in felt)
        dgates = _scatter(dweights, experts_TK.split(layout.slots, dim=1), layout.experts)
        added = [_fill(given, p_TE, layout.experts) if _is_any(given) else None for given in (dgates, dp, dz)]
        dz_TC = x_TI.new_empty(len(x_TI), len(rows_CI))
        tables = _tables_for(layout, x_TI.device)
        _launch(
            "shrink_backward",
            (len(tables.backward[0]), len(x_TI)),
            (
                _fill(dhidden, x_TI, layout.widths),
                *(h_TR, p_TE, weights_TK, experts_TK),
                *(*added, *tables.backward, tables.expert_R, dz_TC),
            ),
            (len(x_TI), h_TR.shape[1], p_TE.shape[1], experts_TK.shape[1]),
            RENORMALISE=ctx.renormalise,
            **layout.blocks,
        )
        drows_CI = (dz_TC.T @ x_TI).split([*layout.widths, *layout.experts])
        if ctx.needs_input_grad[0]:
            dx_TI = add_product(dx_TI, dz_TC, rows_CI)
        # what nothing was made of has no gradient, as if it had not been multiplied
        drows = (d.to(to) if is_felt else None for d, to, is_felt in zip(drows_CI, ctx.dtypes, felt, strict=True))
        return dx_TI, None, None, None, *drows


def _is_any(pieces: Sequence[Tensor | None]) -> bool:
    return any(piece is not None for piece in pieces)


def _fill(pieces: Sequence[Tensor | None], like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Next to each other, zeros where nothing is given, in the dtype of `like`."""
    parts = zip(pieces, sizes, strict=True)
    return torch.cat([like.new_zeros(len(like), n) if d is None else d.to(like.dtype) for d, n in parts], dim=1)


def _scatter(dweights: Sequence[Tensor | None], experts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor | None]:
    """The gradients of slots as those of gates [T, E]."""
    return [
        None if d_TK is None else d_TK.new_zeros(len(d_TK), size).scatter(1, experts_TK, d_TK)
        for d_TK, experts_TK, size in zip(dweights, experts, sizes, strict=True)
    ]


def _launch(
    name: str, size: tuple[int, int], tensors: Sequence[Tensor | None], sizes: Sequence[int], **constants: Any
) -> None:
    """Programs for so many (rows of the table, tokens). Gradients that nothing gives are None among the tensors."""
    from mixora.kernels import launches

    if not size[1]:
        return
    with torch.cuda.device_of(tensors[0]):
        run = getattr(launches, name)[size[0], -(-size[1] // TOKENS)]
        run(*tensors, *sizes, T=TOKENS, **constants, num_warps=8, enable_fp_fusion=True)
