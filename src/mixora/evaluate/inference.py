"""Running a model to measure it: evaluation mode without gradients, and batches of like length."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mixora.display.stages import Advance
from mixora.errors import DataError


@contextmanager
def inference(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; gives the model's device and restores every module's own training flag."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield next(model.parameters()).device
    finally:
        for module, flag in flags:
            module.training = flag


def batch_by_length(
    lengths: Sequence[int], batch_size: int, advance: Advance | None = None
) -> Iterator[tuple[int, ...]]:
    """Row numbers of each batch, longest rows first: little padding, and too large a batch fails at once.

    `advance` is told, after each batch, the rows done and the rows in all.

    Raises:
        DataError: no rows, or a batch size under 1.
    """
    if batch_size < 1:
        raise DataError(f"batch_size: got {batch_size}; valid: 1 or more")
    if not lengths:
        raise DataError("there are no rows to evaluate")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for start in range(0, len(order), batch_size):
        yield tuple(order[start : start + batch_size])
        if advance:
            advance(min(start + batch_size, len(order)), len(order))
