"""The more the loss reacts to a frozen weight, the more its site gets: squared gradients over a few batches.

share ∝ (mean of (dL/dW)² over entries and batches)^power
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from mixora.allocators.budget import BudgetConfig
from mixora.allocators.matrices import check_matrices
from mixora.contracts import Allocator, Candidate, Evidence
from mixora.errors import ConfigError, DataError, ModelError


class SensitivityConfig(BudgetConfig):
    """`batches`: how many are looked at. `power`: 1 for squared gradients, 0.5 for their root, 0 for equal shares.

    `expert_power`: numbers of experts go with share^expert_power, ranks take the rest; 0 leaves the rules' numbers.
    """

    kind: Literal["sensitivity"] = "sensitivity"
    batches: Annotated[int, Field(ge=1)] = 8
    power: Annotated[float, Field(ge=0)] = 0.5
    expert_power: Annotated[float, Field(ge=0, le=1)] = 0.5


class Sensitivity(Allocator):
    """Runs the base, without dropout, forward and backward on the user's batches."""

    Config = SensitivityConfig
    config: SensitivityConfig

    def __init__(self, config: SensitivityConfig) -> None:
        super().__init__(config)
        self.expert_power = config.expert_power

    def weigh(self, candidates: Sequence[Candidate], evidence: Evidence) -> list[float]:
        """(mean squared gradient)^power, at least a millionth of the largest, so that every site counts."""
        check_matrices(candidates)
        batches = list(islice(evidence.batches or (), self.config.batches))
        if not batches:
            raise ConfigError(
                "allocator.kind: 'sensitivity' needs batches of your data; "
                "valid: mixora.allocate(model, config, batches), or a run of `mixora train`"
            )
        weights = [_float_weight(site) for site in candidates]
        sums = [torch.zeros((), dtype=torch.float64) for _ in weights]
        with _only_these_trained(evidence.model, weights, sums):
            for done, batch in enumerate(batches, start=1):
                _backward(evidence.model, batch)
                evidence.progress(done, len(batches))
        means = [float(s) / (len(batches) * w.numel()) for s, w in zip(sums, weights, strict=True)]
        if max(means) == 0 or not all(map(math.isfinite, means)):
            raise DataError(
                "allocator.batches: the loss has no finite gradient on these batches; valid: rows with labels"
            )
        return [max(mean / max(means), 1e-6) ** self.config.power for mean in means]


def _float_weight(site: Candidate) -> nn.Parameter:
    weight = getattr(site.module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.dtype.is_floating_point:
        raise ModelError(
            f"{site.path}: a quantised weight has no gradient; "
            "valid for allocator.kind: 'groups', 'proportional', 'spectral'"
        )
    return weight


def _backward(model: nn.Module, batch: Mapping[str, Tensor]) -> None:
    device = next(model.parameters()).device
    loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
    if loss is None:
        raise DataError("allocator.batches: the model gives no loss on them; valid: batches with labels")
    loss.backward()


@contextmanager
def _only_these_trained(model: nn.Module, weights: list[nn.Parameter], sums: list[Tensor]) -> Iterator[None]:
    """Gradients go to `weights` alone, are squared into `sums` and freed at once; afterwards all is as it was."""
    trained = [p for p in model.parameters() if p.requires_grad]
    was_training = model.training
    model.eval().requires_grad_(False)
    hooks: list[Any] = []
    for weight, total in zip(weights, sums, strict=True):
        weight.requires_grad_(True)
        hooks.append(weight.register_post_accumulate_grad_hook(partial(_square_into, total)))
    try:
        with torch.enable_grad():
            yield
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training).requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _square_into(total: Tensor, weight: Tensor) -> None:
    assert weight.grad is not None
    total += weight.grad.double().square().sum().cpu()
    weight.grad = None
