"""All slots sorted by expert, and all experts in one grouped GEMM of torch: no loop, no synchronisation with the host.

Experts have one rank, and rows are multiples of 16 bytes. Slots of weight 0 are computed as well. Not tried on an
accelerator yet.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from mixora.contracts import Shape
from mixora.errors import ConfigError
from mixora.kernels.sorting import SortingKernel, cast_as_autocast, sort_by_expert
from mixora.routing import Routing

# 16 bytes of the smallest dtype, so that a model may be cast or run under autocast
MULTIPLE = 8
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Slots:
    """The hidden of the sorted slots, [N, r]. place_N: where they stand in the flattened [T, K]; end_E: int32 [E]."""

    hidden_Nr: Tensor
    place_N: Tensor
    token_N: Tensor
    end_E: Tensor


class Grouped(SortingKernel):
    """Slots are all of them."""

    @classmethod
    def objection(cls, shape: Shape, dtype: torch.dtype) -> str | None:
        """Float64, experts of different ranks, and sizes that are no multiple of 8."""
        if dtype not in DTYPES:
            return f"cannot compute in {dtype}; valid: {', '.join(map(str, DTYPES))}"
        if len(set(shape.ranks)) > 1:
            return f"needs experts of one rank, got {list(shape.ranks)}"
        sizes = {"rank": shape.ranks[0], "input width": shape.in_features, "output width": shape.out_features}
        odd = [f"{name} {size}" for name, size in sizes.items() if size % MULTIPLE]
        return f"needs multiples of {MULTIPLE}, got {', '.join(odd)}" if odd else None

    def expand(self, x_TI: Tensor, w_RI: Tensor, routing: Routing, bias_R: Tensor | None = None) -> _Slots:
        """W_e x (+ b_e) for all slots; `ConfigError` for float64 activations."""
        x_TI = cast_as_autocast(x_TI)
        w_EIr = self._split(w_RI, x_TI.dtype).transpose(1, 2)
        slots = self.share(x_TI, routing)
        hidden_Nr = _multiply(slots.hidden_Nr, w_EIr, slots.end_E)
        if bias_R is not None:
            expert_N = routing.experts_TK.flatten().index_select(0, slots.place_N)
            hidden_Nr = hidden_Nr + self._split(bias_R, x_TI.dtype).index_select(0, expert_N)
        return replace(slots, hidden_Nr=hidden_Nr)

    def share(self, hidden_Tr: Tensor, routing: Routing) -> _Slots:
        """The token's hidden for all slots."""
        place_N, counts_E = sort_by_expert(routing.experts_TK, len(self.ranks))
        token_N = place_N // routing.experts_TK.shape[1]
        end_E = counts_E.cumsum(0, dtype=torch.int32)
        return _Slots(hidden_Tr.index_select(0, token_N), place_N, token_N, end_E)

    def map(self, function: Callable[[Tensor], Tensor], slots: _Slots) -> _Slots:
        """The slots with `function` applied to each number."""
        return replace(slots, hidden_Nr=function(slots.hidden_Nr))

    def contract(self, slots: _Slots, w_RO: Tensor, routing: Routing) -> Tensor:
        """Weighted sum over the experts of each token: [T, O]; `ConfigError` for float64 slots."""
        hidden_Nr = cast_as_autocast(slots.hidden_Nr)
        weight_N = routing.weights_TK.flatten().index_select(0, slots.place_N).to(hidden_Nr.dtype)
        y_NO = _multiply(hidden_Nr * weight_N[:, None], self._split(w_RO, hidden_Nr.dtype), slots.end_E)
        return y_NO.new_zeros(len(routing.weights_TK), w_RO.shape[1]).index_add(0, slots.token_N, y_NO)

    def _split(self, tensor_R: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows by expert: [E, r, ...]."""
        return tensor_R.to(dtype).unflatten(0, (len(self.ranks), -1))


def _multiply(x_NI: Tensor, w_EIO: Tensor, end_E: Tensor) -> Tensor:
    """Each row times the matrix of its expert: [N, O]."""
    if x_NI.dtype not in DTYPES:
        raise ConfigError(f"kernel 'grouped' cannot compute in {x_NI.dtype}; valid: kernel 'sorted', or another dtype")
    if x_NI.is_meta:
        # torch has no shapes of grouped products in fp32 there; those of a plain one are the same
        return x_NI @ w_EIO[0]
    return F.grouped_mm(x_NI, w_EIO, offs=end_E)
