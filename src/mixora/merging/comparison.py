"""What merging changes: the mixture and its merged form on the same held-out batches."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional as F

from mixora.display.stages import Advance
from mixora.errors import DataError
from mixora.evaluate.inference import inference
from mixora.evaluate.perplexity import IGNORED
from mixora.merging.approximation import Batch, hooked
from mixora.merging.export import Pairs
from mixora.mixture import Mixture


@dataclass(frozen=True)
class Comparison:
    """Means over `predictions`: supervised tokens, or rows where a model classifies.

    loss: cross-entropy in nats, or the squared error where labels are numbers. mean_difference and max_difference: of
    the absolute difference of two logits. divergence: KL(mixture || merged) in nats, None where labels are numbers.
    """

    predictions: int
    loss_of_mixture: float
    loss_of_merged: float
    mean_difference: float
    max_difference: float
    divergence: float | None


def compare(
    model: PeftModel, modules: Sequence[Mixture], pairs: Pairs, batches: Collection[Batch], advance: Advance
) -> Comparison:
    """Run `model` as it is, and with the pairs in place of the experts of `modules`. Changes nothing."""

    def replace(module: Mixture, args: tuple[Any, ...], output: Tensor) -> Tensor:
        frozen = module.base_layer(*args)
        return (frozen + pairs[module.path].apply(args[0])).to(frozen.dtype)

    tally = _Tally()
    with inference(model) as device:
        for done, batch in enumerate(batches, start=1):
            tensors = {name: tensor.to(device) for name, tensor in batch.items()}
            mixed_NV, labels_N = predict(model, tensors)
            with hooked(modules, replace):
                merged_NV, _ = predict(model, tensors)
            if len(labels_N):
                tally.add(mixed_NV, merged_NV, labels_N)
            advance(done, len(batches))
    if not tally.count:
        raise DataError("held_out: no token is supervised, so there is nothing to measure")
    return tally.result()


class _Tally:
    """Sums over predictions."""

    def __init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64)
        self.largest, self.count, self.is_number = 0.0, 0, False

    def add(self, mixed_NV: Tensor, merged_NV: Tensor, labels_N: Tensor) -> None:
        difference_NV = (mixed_NV - merged_NV).abs()
        divergence = F.kl_div(merged_NV.log_softmax(-1), mixed_NV.log_softmax(-1), reduction="sum", log_target=True)
        losses = sum_loss(mixed_NV, labels_N), sum_loss(merged_NV, labels_N)
        terms = (*losses, difference_NV.mean(dim=1).sum(), divergence)
        self.sums += torch.stack([term.double().cpu() for term in terms])
        self.largest = max(self.largest, float(difference_NV.max()))
        self.count += len(labels_N)
        self.is_number = labels_N.is_floating_point()

    def result(self) -> Comparison:
        loss_of_mixture, loss_of_merged, difference, divergence = (self.sums / self.count).tolist()
        # rounding can take what is 0 below it
        known = None if self.is_number else max(divergence, 0.0)
        return Comparison(self.count, loss_of_mixture, loss_of_merged, difference, self.largest, known)


def predict(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The logits of every supervised prediction, fp32, and their labels."""
    if "labels" not in batch:
        raise DataError(f"held_out: got batches of {', '.join(batch)}; valid: with labels")
    labels, logits = batch["labels"], model(**batch).logits.float()
    if labels.dim() == 1:
        return logits, labels
    if not model.config.is_encoder_decoder:
        labels, logits = labels[:, 1:], logits[:, :-1]
    return logits[labels != IGNORED], labels[labels != IGNORED]


def sum_loss(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Cross-entropy in nats, or squared error where labels are numbers, summed."""
    if labels_N.is_floating_point():
        return F.mse_loss(logits_NV[:, 0], labels_N.float(), reduction="sum")
    return F.cross_entropy(logits_NV, labels_N, reduction="sum")
