"""The best map of low rank from what a site reads to what its experts add, from sums over tokens.

    minimise over A [r, I] and B [r, O]:   sum_t || delta_t - B^T A x_t ||^2

Every delta_t lies in the span of the rows of the experts' B, so with Q [O, q] an orthonormal basis of that span,
delta_t = Q c_t, and the sums G = sum x x^T [I, I], M = sum c x^T [q, I] and sum ||c||^2 hold all there is to know.
With G = V diag(l) V^T, the answer is the truncated singular value decomposition of M V diag(l)^-1/2
(reduced-rank regression: Izenman 1975). All of it is computed in float64.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixora.mixture.low_rank import LowRank


@dataclass
class Inputs:
    """gram_II: the sum of x x^T over the tokens that some sites read; `sites`: the paths of these sites."""

    gram_II: Tensor
    sites: list[str] = field(default_factory=list)

    def add(self, x_TI: Tensor) -> None:
        """Some more tokens, float64."""
        self.gram_II.addmm_(x_TI.T, x_TI)

    def whiten(self) -> Tensor:
        """V diag(l)^-1/2, [I, k], over the k eigenvalues that rounding leaves distinct from 0."""
        values_I, vectors_II = torch.linalg.eigh(self.gram_II)
        kept_I = values_I > values_I[-1] * len(values_I) * torch.finfo(torch.float64).eps
        return vectors_II[:, kept_I] / values_I[kept_I].sqrt()


@dataclass
class Outputs:
    """Sums over what one site adds; `basis_Oq` is Q, None for the identity."""

    moment_qI: Tensor
    basis_Oq: Tensor | None
    energy: float = 0.0

    @classmethod
    def of(cls, b_RO: Tensor, in_features: int) -> "Outputs":
        """Empty sums for experts whose outputs lie in the span of the rows of `b_RO`."""
        rank_sum, out_features = b_RO.shape
        basis_Oq = torch.linalg.qr(b_RO.T.double())[0] if rank_sum < out_features else None
        return cls(b_RO.new_zeros(min(b_RO.shape), in_features, dtype=torch.float64), basis_Oq)

    def add(self, delta_TO: Tensor, x_TI: Tensor) -> None:
        """Some more tokens, float64."""
        c_Tq = delta_TO if self.basis_Oq is None else delta_TO @ self.basis_Oq
        self.moment_qI.addmm_(c_Tq.T, x_TI)
        self.energy += float(c_Tq.square().sum())

    def fit(self, white_Ik: Tensor, rank: int) -> tuple[LowRank, float]:
        """The best pair of `rank` rows, and || residual || / || delta || over all tokens; 0 where nothing is added.

        Rows beyond the rank of the sums are 0.
        """
        left_qn, values_n, right_nk = torch.linalg.svd(self.moment_qI @ white_Ik, full_matrices=False)
        n = min(rank, len(values_n))
        roots_n = values_n[:n].sqrt()
        left_On = left_qn[:, :n] if self.basis_Oq is None else self.basis_Oq @ left_qn[:, :n]
        a_rI = self.moment_qI.new_zeros(rank, len(white_Ik))
        b_rO = self.moment_qI.new_zeros(rank, len(left_On))
        a_rI[:n] = roots_n[:, None] * (right_nk[:n] @ white_Ik.T)
        b_rO[:n] = roots_n[:, None] * left_On.T
        lost = max(self.energy - float(values_n[:n].square().sum()), 0.0)
        return LowRank(a_rI, b_rO), (lost / self.energy) ** 0.5 if self.energy else 0.0
