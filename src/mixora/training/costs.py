"""What a training took: seconds, tokens per second, memory."""

import resource
import sys
from typing import Any

import torch

MEBIBYTE = 2**20


def describe_costs(seconds: float | None, tokens: int) -> dict[str, Any]:
    """For a run's environment: `train_seconds`, `train_tokens_per_second` and `peak_memory_mib` so far.

    `tokens`: those that were trained on, padding left out. On a GPU the memory is what PyTorch allocated there at
    most, else the most that this process had resident, evaluation and the base's weights included in both. Of a run
    that was resumed, the seconds are those since then, and its tokens those of the whole run.
    """
    return {
        "train_seconds": None if seconds is None else round(seconds, 3),
        "train_tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_mib": round(_peak_bytes() / MEBIBYTE, 1),
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
