"""Training-free: the heavier the tail of a weight's spectrum, the better trained it is, and the less it gets.

share ∝ exponent^beta, the exponent by the Hill estimator (as AlphaLoRA does for numbers of experts, arXiv 2410.10054)
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from peft.utils.integrations import dequantize_module_weight
from pydantic import Field
from torch import Tensor

from mixora.allocators.budget import BudgetConfig
from mixora.allocators.matrices import check_matrices
from mixora.contracts import Allocator, Candidate, Evidence
from mixora.errors import ModelError


class SpectralConfig(BudgetConfig):
    """`beta`: how strongly the exponents tell. `tail`: the part of the spectrum that counts as its tail.

    `expert_power`: numbers of experts go with share^expert_power, ranks take the rest; 0 leaves the rules' numbers.
    """

    kind: Literal["spectral"] = "spectral"
    beta: Annotated[float, Field(ge=0)] = 2.5
    tail: Annotated[float, Field(gt=0, lt=1)] = 0.5
    expert_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class Spectral(Allocator):
    """Looks at the frozen weights alone."""

    Config = SpectralConfig
    config: SpectralConfig

    def __init__(self, config: SpectralConfig) -> None:
        super().__init__(config)
        self.expert_power = config.expert_power

    def weigh(self, candidates: Sequence[Candidate], evidence: Evidence) -> list[float]:
        """exponent^beta, the largest made 1; `ModelError` for weights that are not there or have no tail."""
        check_matrices(candidates)
        found = []
        for done, site in enumerate(candidates, start=1):
            exponent = hill_exponent(_squared_singular_values(site), self.config.tail)
            if exponent is None:
                raise ModelError(
                    f"{site.path}: its singular values are all equal or not finite, so their tail has no exponent; "
                    "valid for allocator.kind: 'groups', 'proportional', 'sensitivity'"
                )
            found.append(exponent)
            evidence.progress(done, len(candidates))
        return [(exponent / max(found)) ** self.config.beta for exponent in found]


def hill_exponent(values: Tensor, tail: float) -> float | None:
    """Exponent a of a density ~ x^-a above the (k+1)-th largest of n values, k = n * tail (1 to n - 1).

    1 + k / sum_{i <= k} log(x_i / x_{k+1}), Hill 1975. `values`: [n], not negative. None where that is no number.
    """
    sorted_n = values.double().sort(descending=True).values
    k = min(max(int(len(sorted_n) * tail), 1), len(sorted_n) - 1)
    if k < 1 or not torch.isfinite(sorted_n).all() or sorted_n[0] <= 0:
        return None
    # zeros of a deficient rank lie at rounding error
    floor = sorted_n[0] * torch.finfo(torch.float64).eps
    logs_n = sorted_n.clamp(min=float(floor)).log()
    spread = float((logs_n[:k] - logs_n[k]).sum())
    return 1 + k / spread if spread > 1e-6 * k else None


def _squared_singular_values(site: Candidate) -> Tensor:
    """The eigenvalues of the smaller of W W^T and W^T W: float64 [min(I, O)]."""
    if any(p.is_meta for p in site.module.parameters()):
        raise ModelError(
            "allocator.kind: 'spectral' reads the weights of the base, and this model has none (meta device); "
            "valid: a loaded model"
        )
    weight = dequantize_module_weight(site.module).detach().double()
    weight = weight if weight.shape[0] <= weight.shape[1] else weight.T
    if not torch.isfinite(weight).all():
        return weight.flatten()
    return torch.linalg.eigvalsh(weight @ weight.T).clamp(min=0)
