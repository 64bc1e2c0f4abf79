"""Peak memory of a training step of a whole model: mixtures against PEFT's LoRA of the same active rank.

The steps are those of `step`. Counted is what storages hold at once besides weights and batch, without the workspace
of single operators; turns differ only where a model allocates differently from step to step.
"""

import argparse
from typing import Any

import torch

from benchmarks.measuring import compare_memory, tabulate
from benchmarks.running import add_dtypes
from benchmarks.training_step import YARDSTICK, variants


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dtypes(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)


def measure(dtype_name: str, layers: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each variant."""
    steps = dict(variants(layers, getattr(torch, dtype_name)))
    for step in steps.values():
        # what a first step keeps for good is not the peak of a step
        step()
    return tabulate(compare_memory(steps, YARDSTICK, repeats), dtype=dtype_name)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows = [row for dtype in options.dtype for row in measure(dtype, options.layers, options.repeats)]
    return {"layers": options.layers, "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    title = f"Peak memory of a training step, {found['layers']} layers"
    return draw_ratios(found["rows"], ("dtype",), title, f"peak / {YARDSTICK}", ratio="memory_ratio", unit="mebibytes")
