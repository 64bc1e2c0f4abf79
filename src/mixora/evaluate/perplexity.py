"""Loss per supervised token, exact for any batch size, and the perplexity that follows from it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixora.display.stages import Advance
from mixora.errors import DataError
from mixora.evaluate.inference import batch_by_length, inference

IGNORED = -100

Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]
"""Turns encoded rows into a batch of tensors."""


def token_loss(
    model: nn.Module, dataset: Any, collator: Collate, batch_size: int, advance: Advance | None = None
) -> dict[str, float]:
    """Mean negative log-likelihood over all supervised tokens.

    Not the mean of batch means: every token counts the same, so the batch size and the order of rows change nothing
    beyond rounding. Log-likelihoods are computed in float32 from the logits and added up in float64.

    Args:
        model: a causal or an encoder-decoder language model.
        dataset: a sequence of encoded rows, each a mapping with `input_ids` and `labels` (-100: not supervised).
        collator: see `Collate`.
        batch_size: rows per batch.
        advance: told the rows done and the rows in all, after each batch.

    Returns:
        "loss" in nats per token, "perplexity" (infinite where exp overflows), "tokens" counted.

    Raises:
        DataError: no rows, or no supervised token.
    """
    rows = list(dataset)
    sums, counts = [], []
    with inference(model) as device:
        for batch in batch_by_length([len(row["input_ids"]) for row in rows], batch_size, advance):
            losses, tokens = _row_losses(model, collator([rows[row] for row in batch]), device)
            sums += losses
            counts += tokens
    total = sum(counts)
    if not total:
        raise DataError("no token is supervised, so there is no loss to measure")
    loss = math.fsum(sums) / total
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": float(total)}


def log_likelihoods(
    model: nn.Module,
    rows: Sequence[dict[str, Any]],
    collator: Collate,
    batch_size: int,
    advance: Advance | None = None,
) -> list[float]:
    """Summed log-probability of the supervised tokens of each row, in nats; rows must not be packed."""
    results = [0.0] * len(rows)
    with inference(model) as device:
        for batch in batch_by_length([len(row["input_ids"]) for row in rows], batch_size, advance):
            losses, _ = _row_losses(model, collator([rows[row] for row in batch]), device)
            for row, loss in zip(batch, losses, strict=True):
                results[row] = -loss
    return results


def _row_losses(model: Any, batch: dict[str, Tensor], device: torch.device) -> tuple[list[float], list[int]]:
    """Summed loss and number of supervised tokens for each row of the batch tensors."""
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    if model.config.is_encoder_decoder:
        labels = batch["labels"]  # the model makes the decoder's inputs from them
        logits = model(**batch).logits
    else:
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch, use_cache=False).logits[:, :-1]  # with a cache, rows of a bin would see each other
    kept = labels != IGNORED
    losses = F.cross_entropy(logits[kept].float(), labels[kept], reduction="none").double().cpu()
    row_of = kept.nonzero()[:, 0].cpu()
    sums = torch.zeros(len(labels), dtype=torch.float64).index_add_(0, row_of, losses)
    return sums.tolist(), kept.sum(dim=1).tolist()
