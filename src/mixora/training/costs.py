"""What a training took: seconds, tokens per second, memory."""

import resource
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from transformers.trainer_callback import ExportableState

MEBIBYTE = 2**20


class Clock(TrainerCallback, ExportableState):
    """Seconds of training, kept in checkpoints, so that those of all parts of an interrupted run add up.

    What was trained after the last checkpoint, and again later, counts once; so do its tokens in the trainer's state.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.before = before
        self._began: float | None = None

    @classmethod
    def of(cls, state: TrainerState | None) -> "Clock":
        """One that goes on from a checkpoint's state; a new one without."""
        kept = {} if state is None else state.stateful_callbacks.get(cls.__name__, {})
        return cls(**kept.get("attributes", {}))

    @property
    def seconds(self) -> float:
        """Until now."""
        return self.before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start."""
        self._began = time.perf_counter()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        self.before, self._began = self.seconds, None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"before": self.seconds}}


def describe_costs(seconds: float, tokens: int) -> dict[str, Any]:
    """For a run's environment: `train_seconds`, `train_tokens_per_second` and `peak_memory_mib` so far.

    `tokens`: those that were trained on, padding left out. On a GPU the memory is what PyTorch allocated there at
    most, else the most that this process had resident, evaluation and the base's weights included in both. Of a run
    that was resumed, seconds and tokens are those of all its parts, see `Clock`, and the memory is that of the last.
    """
    return {
        "train_seconds": round(seconds, 3),
        "train_tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_mib": round(_peak_bytes() / MEBIBYTE, 1),
    }


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    # Linux counts in KiB, macOS in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
