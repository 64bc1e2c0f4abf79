"""What a router decided: one record for every kind of routing, and the trace that carries it to losses and reports.

Shape letters used throughout: T tokens, K chosen per token, E experts, I in, O out, R rank (summed over experts).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mixora.routing.draws import MEAN, Draw


@dataclass(frozen=True)
class Tokens:
    """Which of T tokens are real, and which routing group (sequence) each belongs to.

    `valid_T`: bool [T], False on padding. `group_T`: int64 [T], equal for the tokens of one sequence, in [0, T).
    `observed` is True while a trace is open: routers then also work out what capacity would admit. `draw`: the route of
    the pass at this site, for routers that choose one for all tokens.
    """

    valid_T: Tensor
    group_T: Tensor
    observed: bool = False
    draw: Draw = MEAN


@dataclass(frozen=True)
class Routing:
    """The choice of experts for T tokens; shapes are static, so a slot that is not used has weight 0.

    `experts_TK`: int64, the K distinct experts of each token. `weights_TK`: float, 0 where the slot was dropped or the
    token is padding. `assigned_TK`: bool, slots the router chose (before capacity); padding is never assigned.
    `admitted_TK`: bool, those of them that the capacity limit lets in. `logits_TE` and `probs_TE`: fp32 router outputs,
    None for routers without any; columns of null experts follow those of the E experts. `valid_T`: bool, real tokens.
    `null_slots_T`: int64, how many choices of a token fell on null experts; None for routers without any. `is_soft`:
    every token uses every expert, so that weights, not choices, tell the load.
    """

    experts_TK: Tensor
    weights_TK: Tensor
    assigned_TK: Tensor
    admitted_TK: Tensor
    valid_T: Tensor
    num_experts: int
    logits_TE: Tensor | None = None
    probs_TE: Tensor | None = None
    null_slots_T: Tensor | None = None
    is_soft: bool = False

    @classmethod
    def even(cls, valid_T: Tensor, experts: Sequence[int], num_experts: int) -> "Routing":
        """Every token to all of `experts`, of equal weight. Padding passes too: without a choice it disturbs nobody."""
        size = (len(valid_T), len(experts))
        experts_TK = torch.tensor(experts, device=valid_T.device).expand(size)
        weights_TK = torch.full(size, 1 / len(experts), dtype=torch.float32, device=valid_T.device)
        assigned_TK = valid_T[:, None].expand(size)
        return cls(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, num_experts, is_soft=len(experts) > 1)

    def gates_TE(self) -> Tensor:
        """The weights as a dense [T, E] matrix, 0 for experts that were not chosen."""
        gates_TE = self.weights_TK.new_zeros(len(self.weights_TK), self.num_experts)
        return gates_TE.scatter(1, self.experts_TK, self.weights_TK)

    def by_slot(self) -> "Routing":
        """The same choices for K * T tokens of one expert each: row k T + t is the k-th choice of token t."""
        return Routing(
            self.experts_TK.T.reshape(-1, 1),
            self.weights_TK.T.reshape(-1, 1),
            self.assigned_TK.T.reshape(-1, 1),
            self.admitted_TK.T.reshape(-1, 1),
            self.valid_T.repeat(self.experts_TK.shape[1]),
            self.num_experts,
        )

    def unweighted(self) -> "Routing":
        """The same choices with weight 1, where they have any."""
        return replace(self, weights_TK=(self.weights_TK != 0).to(self.weights_TK.dtype))

    def load_E(self) -> Tensor:
        """Share of the assignments (before capacity) that went to each expert: [E], sums to 1, or all 0.

        Where routing is soft, the mean weight of each expert over the real tokens.
        """
        counts_E = self._counts_E()
        return counts_E / counts_E.sum().clamp(min=1)

    def counts_of_columns(self) -> Tensor:
        """What `load_E` has shares of, for each column of `probs_TE`; null experts share theirs evenly: [E + N]."""
        counts = self._counts_E()
        if self.null_slots_T is not None and self.probs_TE is not None:
            nulls = self.probs_TE.shape[1] - self.num_experts
            each = self.null_slots_T.sum().to(counts.dtype) / nulls
            counts = torch.cat([counts, each.expand(nulls)])
        return counts

    def _counts_E(self) -> Tensor:
        shares_TK = self.weights_TK.detach() if self.is_soft else self.assigned_TK.to(self.weights_TK.dtype)
        return shares_TK.new_zeros(self.num_experts).scatter_add(0, self.experts_TK.flatten(), shares_TK.flatten())


@dataclass(frozen=True)
class Observation:
    """One routing that a trace saw: where, for which adapter, in which forward pass.

    `with_grad`: gradients were on where the pass began (a re-entrant checkpoint may switch them off further in).
    """

    path: str
    adapter: str
    pass_index: int
    with_grad: bool
    routing: Routing


@dataclass
class Trace:
    """Everything the routers of a model decided while the trace was open, in order of execution.

    `owns_losses`: whoever opened the trace adds the auxiliary losses, so the layers must not.
    """

    owns_losses: bool = False
    observations: list[Observation] = field(default_factory=list)
    passes: int = 0

    def of(self, path: str) -> list[Routing]:
        """The routings seen at one site, one for each forward pass."""
        return [o.routing for o in self.observations if o.path == path]
