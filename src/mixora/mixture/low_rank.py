"""A pair of thin matrices: what an ordinary LoRA holds at one linear module."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class LowRank:
    """The change scale * B^T A of a weight [O, I]: A_rI and B_rO of one dtype."""

    A_rI: Tensor
    B_rO: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of both matrices."""
        return len(self.A_rI)

    def delta_OI(self) -> Tensor:
        """The change itself."""
        return self.scale * self.B_rO.T @ self.A_rI

    def apply(self, x: Tensor) -> Tensor:
        """What the change adds to the output for the input `x` [..., I]: [..., O] in the dtype of the pair."""
        return self.scale * (x.to(self.A_rI.dtype) @ self.A_rI.T @ self.B_rO)

    def pad(self, rank: int) -> "LowRank":
        """The same change with rows of zeros below, `rank` in all; for a rank that is not smaller than its own."""
        below = (0, 0, 0, rank - self.rank)
        return LowRank(F.pad(self.A_rI, below), F.pad(self.B_rO, below), self.scale)

    def truncate(self, rank: int) -> tuple["LowRank", float]:
        """The nearest pair of at most `rank`, and its distance, both in the Frobenius norm; 0 for a change of 0.

        The distance is relative to the norm of the change. The singular values of B^T A are those of the product of
        the triangular factors of A^T and B^T, r x r, computed in float64 (Eckart and Young 1936).
        """
        if rank >= self.rank:
            return self, 0.0
        a_Ik, a_kr = torch.linalg.qr(self.A_rI.T.double())
        b_Ok, b_kr = torch.linalg.qr(self.B_rO.T.double())
        left, values, right = torch.linalg.svd(b_kr @ a_kr.T, full_matrices=False)
        roots = values[:rank].sqrt()
        A_rI = roots[:, None] * (right[:rank] @ a_Ik.T)
        B_rO = roots[:, None] * (left[:, :rank].T @ b_Ok.T)
        energy = float(values.square().sum())
        lost = float(values[rank:].square().sum())
        pair = LowRank(A_rI.to(self.A_rI.dtype), B_rO.to(self.B_rO.dtype), self.scale)
        return pair, (lost / energy) ** 0.5 if energy else 0.0
