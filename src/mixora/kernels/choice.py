"""What `kernel: auto` stands for: `stacked` up to a limit of R / K, `sorted` above it.

R is the sum of the ranks that are computed at once, K the number of experts of a token: all experts at once cost R
columns, the chosen ones about K * R / E and the way there and back.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

# The row `cpu` is what `python -m benchmarks.kernels` found (one thread; the newest file in benchmarks/results). The row
# `cuda` is an estimate from the traffic and the products of an H100, not a measurement; other accelerators follow it.
STACKED_UP_TO: Mapping[str, Mapping[str, int]] = {
    "cpu": {"float32": 48, "bfloat16": 64},
    "cuda": {"float32": 340, "bfloat16": 340},
}


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its first weight in floating point."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())


def find_limit(model: nn.Module) -> int:
    """The limit for a model's dtype and device; on the meta device for CUDA where there is any, else for the CPU."""
    device_type = next((p.device.type for p in model.parameters()), "cpu")
    if device_type == "meta":
        device_type = "cuda" if torch.cuda.is_available() else "cpu"
    return STACKED_UP_TO["cpu" if device_type == "cpu" else "cuda"][_width_of(dtype_of(model))]


def _width_of(dtype: torch.dtype) -> str:
    return "bfloat16" if dtype.itemsize == 2 else "float32"


def choose(breadth: float, limit: int) -> str:
    """The kernel for a site whose R / K is `breadth`."""
    return "stacked" if breadth <= limit else "sorted"


def explain(breadths: Sequence[float], limit: int) -> str:
    """Why sites of these R / K, all on one side of the limit, got their kernel."""
    low, high = min(breadths), max(breadths)
    span = f"{low:g}" if low == high else f"{low:g}-{high:g}"
    return f"R/K {span} {'≤' if high <= limit else '>'} {limit}"
