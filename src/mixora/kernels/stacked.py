"""All experts of a site as one wide adapter: a pair of GEMMs, the hidden of unchosen experts masked by zero gates.

Costs R instead of K * rank columns and wins while R / K is small, since one wide GEMM beats E gathers.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mixora.contracts import Kernel
from mixora.routing import Routing


class Stacked(Kernel):
    """Slots are the hidden of all experts, [T, R]."""

    def expand(self, x_TI: Tensor, w_RI: Tensor, routing: Routing, bias_R: Tensor | None = None) -> Tensor:
        """W x (+ b) for all experts: [T, R]."""
        return F.linear(x_TI, w_RI.to(x_TI.dtype), None if bias_R is None else bias_R.to(x_TI.dtype))

    def share(self, hidden_Tr: Tensor, routing: Routing) -> Tensor:
        """The same hidden once per expert: [T, R]."""
        return hidden_Tr.repeat(1, len(self.ranks))

    def map(self, function: Callable[[Tensor], Tensor], slots: Tensor) -> Tensor:
        """The slots with `function` applied to each number."""
        return function(slots)

    def by_slot(self, slots: Tensor, routing: Routing) -> Tensor:
        """The hidden of all experts once per slot: [K T, R]."""
        return slots.repeat(routing.experts_TK.shape[1], 1)

    def by_token(self, slots: Tensor, routing: Routing) -> Tensor:
        """The hidden of each chosen expert from its slot: [T, R]."""
        chosen_SR = slots * self._spread(routing.by_slot().unweighted(), slots)
        return chosen_SR.view(routing.experts_TK.shape[1], -1, slots.shape[1]).sum(dim=0)

    def contract(self, slots: Tensor, w_RO: Tensor, routing: Routing) -> Tensor:
        """Weighted sum over the experts of each token: [T, O]."""
        return (slots * self._spread(routing, slots)) @ w_RO.to(slots.dtype)

    def _spread(self, routing: Routing, slots: Tensor) -> Tensor:
        """The gate of its expert for each rank, in the dtype of the slots: [T, R]."""
        return routing.gates_TE().to(slots.dtype) @ segments_ER(self.ranks, slots.dtype, slots.device)


_segments: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}


def segments_ER(ranks: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 where a rank belongs to an expert. Spreading gates with this GEMM is exact (one non-zero per column).

    Kept for the next call: a model has few different sites.
    """
    key = (ranks, dtype, device)
    if key not in _segments:
        with torch.inference_mode(False), torch.no_grad():
            expert_R = torch.repeat_interleave(torch.tensor(ranks))
            _segments[key] = F.one_hot(expert_R, len(ranks)).T.to(device, dtype)
    return _segments[key]
