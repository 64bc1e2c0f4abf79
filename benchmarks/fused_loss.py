"""Time and memory of the loss behind a frozen head: fused against transformers' own, one pass and two (consistency)."""

import argparse
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from benchmarks.measuring import Step, compare, compare_memory, tabulate
from benchmarks.running import add_dtypes, run
from mixora.losses import fused as fused_loss
from mixora.losses.consistency import Consistency, ConsistencyConfig

CHUNKS = (64, 128, 256, 512)
consistency = Consistency(ConsistencyConfig())


def make_inputs(args, dtype):
    """Hidden states of two passes, the head, the labels."""
    torch.manual_seed(0)
    hidden = [torch.randn(args.tokens, args.width).to(dtype).requires_grad_() for _ in range(2)]
    weight = (torch.randn(args.vocabulary, args.width) * 0.05).to(dtype)
    return *hidden, weight, torch.randint(0, args.vocabulary, (args.tokens,))


def run_own(passes, first, second, weight, labels):
    """As transformers computes it, and from the same logits the consistency."""
    first_NC = F.linear(first, weight)
    loss = ForCausalLMLoss(first_NC, None, len(weight), shift_labels=labels)
    if passes == 2:
        loss = loss + consistency.of_items(first_NC, F.linear(second, weight), False).mean()
    loss.backward()


def run_fused(passes, chunk, first, second, weight, labels):
    # it counts tokens of a head in 32 bits
    fused_loss.CHUNK = chunk * weight.itemsize // 4
    if passes == 1:
        total = fused_loss.cross_entropy(first, weight, labels)
    else:
        total = sum(fused_loss.cross_entropy_and_agreement(first, second, weight, labels))
    (total / len(labels)).backward()


def variants(passes, chunks=CHUNKS):
    yield "transformers", lambda *inputs: run_own(passes, *inputs)
    for chunk in chunks:
        yield f"fused, {chunk} tokens", lambda *inputs, chunk=chunk: run_fused(passes, chunk, *inputs)


def make_steps(args, dtype, passes) -> dict[str, Step]:
    inputs = make_inputs(args, dtype)

    def step(run_once):
        for hidden in inputs[:2]:
            hidden.grad = None
        run_once(*inputs)

    return {name: partial(step, run_once) for name, run_once in variants(passes)}


def measure(args, dtype_name, passes) -> list[dict[str, Any]]:
    """A row for each variant; memory is beside the inputs."""
    before = fused_loss.CHUNK
    try:
        steps = make_steps(args, getattr(torch, dtype_name), passes)
        times = compare(steps, "transformers", args.repeats)
        peaks = compare_memory(steps, "transformers")
    finally:
        fused_loss.CHUNK = before
    return tabulate({name: {**times[name], **peaks[name]} for name in steps}, dtype=dtype_name, passes=passes)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dtypes(parser)
    for name, default in {"width": 576, "vocabulary": 49152, "tokens": 1024, "repeats": 7}.items():
        parser.add_argument(f"--{name}", type=int, default=default)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows = [row for dtype in options.dtype for passes in (1, 2) for row in measure(options, dtype, passes)]
    return {"sizes": {name: getattr(options, name) for name in ("width", "vocabulary", "tokens")}, "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    sizes = ", ".join(f"{name} {size}" for name, size in found["sizes"].items())
    return draw_ratios(found["rows"], ("dtype", "passes"), f"Loss behind a frozen head: {sizes}", "time / transformers")


if __name__ == "__main__":
    run("loss")
