"""How alike the experts of a site are: in their weights, and in which tokens they get.

Expert i adds B_i^T A_i x (behind a module: B_i^T gelu(A_i f(x)), of which the linear part is compared). With the inner
product of matrices, which is a sum over products of rows,

    <B_i^T A_i, B_j^T A_j> = sum over ranks r of i, s of j of (A A^T)_rs (B B^T)_rs

so no matrix of the module's size is made. The correlation is Pearson's, over tokens, of being chosen or not; where
routing is soft, of the weights.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mixora.diagnostics.record import Similar
from mixora.diagnostics.verdict import LEAST_TOKENS, TWIN, likeness
from mixora.routing import Routing

MOST_TWINS = 5  # kept per site


def cosines_of(a_RI: Tensor, b_RO: Tensor, ranks: Sequence[int]) -> Tensor:
    """The cosine of each two experts' matrices: fp32 [E, E], NaN where one of them is zero.

    `a_RI` and `b_RO` hold the experts' rows below each other; one common A [rank, I] serves all of them.
    """
    a_RI, b_RO = a_RI.detach().float(), b_RO.detach().float()
    a_RI = a_RI.repeat(len(b_RO) // len(a_RI), 1)
    owner_R = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(a_RI.device)
    is_of_ER = (owner_R == torch.arange(len(ranks), device=a_RI.device)[:, None]).float()
    inner_EE = is_of_ER @ ((a_RI @ a_RI.T) * (b_RO @ b_RO.T)) @ is_of_ER.T
    norm_E = inner_EE.diagonal().sqrt()
    return inner_EE / (norm_E[:, None] * norm_E)


def choices_of(routing: Routing) -> Tensor:
    """How much of each real token an expert gets: 1 or 0, or its weight where routing is soft; fp64 [T, E]."""
    shares_TK = routing.weights_TK if routing.is_soft else routing.assigned_TK
    choices_TE = shares_TK.new_zeros(len(shares_TK), routing.num_experts, dtype=torch.float64)
    return choices_TE.scatter(1, routing.experts_TK, shares_TK.double())[routing.valid_T]


class Correlation:
    """Pearson's correlation of the experts of one site over tokens, batch after batch."""

    def __init__(self) -> None:
        self.tokens = 0
        self.sum_E: Tensor | float = 0.0
        self.products_EE: Tensor | float = 0.0

    def add(self, choices_TE: Tensor) -> None:
        """The tokens of one batch."""
        self.tokens += len(choices_TE)
        self.sum_E = self.sum_E + choices_TE.sum(dim=0)
        self.products_EE = self.products_EE + choices_TE.T @ choices_TE

    def values(self) -> Tensor:
        """[E, E]; NaN for an expert that too few tokens reach, or all but too few: they would agree by chance."""
        assert isinstance(self.sum_E, Tensor) and isinstance(self.products_EE, Tensor)
        covariance_EE = self.tokens * self.products_EE - self.sum_E[:, None] * self.sum_E
        variance_E = covariance_EE.diagonal()
        is_known_E = (self.sum_E >= LEAST_TOKENS) & (self.sum_E <= self.tokens - LEAST_TOKENS)
        # what rounding leaves of a variance of 0
        is_known_E &= variance_E > 1e-9 * self.tokens * self.products_EE.diagonal()
        deviation_E = variance_E.where(is_known_E, torch.nan).sqrt()
        return covariance_EE / (deviation_E[:, None] * deviation_E)


def find_similar(path: str, cosines_EE: Tensor | None, correlations_EE: Tensor | None) -> list[Similar]:
    """Of the experts of a site the most similar pair by weights, the one by routing, and the first twins."""
    known = [values for values in (cosines_EE, correlations_EE) if values is not None]
    experts = max(map(len, known), default=0)
    pairs = [
        Similar(path=path, first=i, second=j, cosine=_read(cosines_EE, i, j), correlation=_read(correlations_EE, i, j))
        for i in range(experts)
        for j in range(i + 1, experts)
    ]
    twins = sorted((pair for pair in pairs if likeness(pair) >= TWIN), key=likeness, reverse=True)[:MOST_TWINS]
    return list(dict.fromkeys([*twins, *_largest(pairs, "cosine"), *_largest(pairs, "correlation")]))


def _largest(pairs: Iterable[Similar], name: str) -> list[Similar]:
    known = [pair for pair in pairs if getattr(pair, name) is not None]
    return [max(known, key=lambda pair: getattr(pair, name))] if known else []


def _read(values_EE: Tensor | None, i: int, j: int) -> float | None:
    value = float("nan") if values_EE is None else float(values_EE[i, j])
    return None if value != value else value
