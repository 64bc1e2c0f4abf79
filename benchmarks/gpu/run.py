"""Checks and times everything on one NVIDIA GPU, within ten minutes, into one JSON file.

    python -m benchmarks.gpu.run [--tiny] [--device cuda] [--out FILE]

Models have Llama's 1B and 8B shapes in bf16 and random weights, the 8B few blocks and extrapolated (see `llama`); steps
have their fraction of the roofline (see `roofline`). Sections come in the order of their weight. Each has a budget of
seconds; one that fails or runs out of it leaves its error in the file, and the next one begins. The file is written
anew after each section. Without CUDA every section is skipped, with the reason; `--device cpu` runs them all on a CPU.
`--tiny`: sizes at which that takes a minute. What the kernels compute on a GPU is tested by `pytest tests/kernels`.
"""

import argparse
import gc
import json
import platform
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mixora.losses.fused
from benchmarks import fused_loss, kernels, layers, training_step
from benchmarks.gpu import llama, roofline
from benchmarks.measuring import peak_mebibytes, time_together
from benchmarks.recording import RESULTS
from mixora.kernels import KERNELS

# the largest difference from the reference, as a part of the reference's largest number
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Sizes:
    device: str
    few_layers: int = 4
    tokens: int = 4096
    vocabulary: int = 49152
    widths: tuple[int, ...] = kernels.WIDTHS
    ranks: tuple[int, ...] = kernels.RANKS
    chunks: tuple[int, ...] = (64, 128, 256, 512, 1024, 2048, 4096)
    repeats: int = 15
    small: roofline.Llama = llama.SMALL
    one_b: roofline.Llama = llama.ONE_B
    eight_b: roofline.Llama = llama.EIGHT_B
    few_blocks: tuple[int, int] = (2, 6)
    batch: tuple[int, int] = (4, 1024)
    joined_ranks: tuple[int, ...] = (8, 32, 128)

    @property
    def peak(self) -> roofline.Peak | None:
        """Of the device that measures."""
        return roofline.find_peak(torch.cuda.get_device_name()) if self.device == "cuda" else None


def make_tiny(device: str) -> Sizes:
    shape = {
        "small": llama.TINY,
        "one_b": llama.TINY,
        "eight_b": llama.TINY,
        "few_blocks": (1, 2),
        "batch": (2, 8),
        "joined_ranks": (8,),
    }
    return Sizes(device, 1, 24, 512, (16,), (8, 512), (8, 16), 1, **shape)


def describe_environment(sizes: Sizes) -> dict[str, Any]:
    found: dict[str, Any] = {"torch": torch.__version__, "python": platform.python_version(), "device": sizes.device}
    if sizes.device == "cuda":
        device = torch.cuda.get_device_properties(0)
        found |= {"gpu": device.name, "cuda": torch.version.cuda, "mebibytes": device.total_memory >> 20}
        found["peak"] = vars(sizes.peak) if sizes.peak else "not in the table of benchmarks/gpu/roofline.py"
        found |= {"capability": f"{device.major}.{device.minor}", "multiprocessors": device.multi_processor_count}
    return found


def check_kernels(sizes: Sizes) -> list[dict[str, Any]]:
    """Values and gradients of every kernel against `loop`, on an even load and where one expert gets every token."""
    rows = []
    site = kernels.Case(sizes.widths[0], "float32", 8, tokens=sizes.tokens)
    cases = [replace(site, dtype=dtype, skewed=skewed) for dtype in kernels.DTYPES for skewed in (False, True)]
    for case in cases:
        for name in KERNELS:
            if KERNELS[name].objection(case.shape, getattr(torch, case.dtype)) is None:
                found, wanted = (kernels.make_step(n, case, sizes.device)() for n in (name, "loop"))
                rows.append(_judge(name, case.dtype, found, wanted, case.skewed))
    return rows


def check_joint(sizes: Sizes) -> list[dict[str, Any]]:
    """A model's loss and gradients with kernels that compute the frozen linear too, against `loop`."""
    rows = []
    for dtype in kernels.DTYPES:
        of_dtype = getattr(torch, dtype)
        shape = kernels.Case(16, dtype, 8).shape
        wanted = _differentiate("loop", of_dtype, sizes)
        for name, kernel in KERNELS.items():
            if kernel.joins and kernel.objection(shape, of_dtype) is None:
                rows.append(_judge(name, dtype, _differentiate(name, of_dtype, sizes), wanted, False))
    return rows


def _differentiate(kernel: str, dtype: torch.dtype, sizes: Sizes) -> list[Tensor]:
    base = llama.make_base(sizes.small, sizes.few_layers, dtype, sizes.device)
    # every expert serves every token, so that no rounding turns a choice
    model = training_step.make_mixture(base, kernel=kernel, top_k=8)
    loss = model(**llama.make_batch(sizes.small, *sizes.batch, sizes.device)).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def _judge(name: str, dtype: str, found: list[Tensor], wanted: list[Tensor], skewed: bool) -> dict[str, Any]:
    pairs = zip(found, wanted, strict=True)
    error = max(((got - want).abs().max() / want.abs().max().clamp(min=1e-12)).item() for got, want in pairs)
    facts = {"kernel": name, "dtype": dtype, "skewed": skewed, "error": error, "tolerance": TOLERANCE[dtype]}
    return {**facts, "passed": error <= TOLERANCE[dtype]}


def train_small(sizes: Sizes) -> dict[str, Any]:
    return llama.train_whole(sizes.small, sizes.batch, _some(sizes, 5), sizes.device, sizes.peak)


def time_fused_loss(sizes: Sizes) -> list[dict[str, Any]]:
    """The loss behind a head in bf16, fused with several chunk sizes and as transformers computes it."""
    before = mixora.losses.fused.CHUNK
    try:
        return _time_chunks(sizes)
    finally:
        # later sections take the chunks that a user gets
        mixora.losses.fused.CHUNK = before


def _time_chunks(sizes: Sizes) -> list[dict[str, Any]]:
    width = sizes.widths[0]
    given = argparse.Namespace(tokens=sizes.tokens, width=width, vocabulary=sizes.vocabulary)
    tensors = [tensor.detach().to(sizes.device) for tensor in fused_loss.make_inputs(given, torch.bfloat16)]
    inputs = [*(hidden.requires_grad_() for hidden in tensors[:2]), *tensors[2:]]
    rows = []
    for passes in (1, 2):
        runs = dict(fused_loss.variants(passes, sizes.chunks))
        steps = {name: lambda run=run: run(*inputs) for name, run in runs.items()}
        ms = time_together(steps, sizes.repeats, sizes.device)
        peaks = {name: peak_mebibytes(step, sizes.device) for name, step in steps.items()}
        rows += [{"passes": passes, "variant": name, "ms": ms[name], "mebibytes": peaks[name]} for name in steps]
    return rows


def time_kernels(sizes: Sizes) -> dict[str, Any]:
    """All kernels over R / K, and the limits for `kernels/choice.py` that follow."""
    cases = [
        kernels.Case(w, d, r, tokens=sizes.tokens) for d in kernels.DTYPES for w in sizes.widths for r in sizes.ranks
    ]
    rows = kernels.measure_speed(cases, sizes.repeats, sizes.device)
    try:
        limits: Any = kernels.find_limits(rows)
    except ValueError as error:
        limits = str(error)
    return {"limits": limits, "rows": rows}


def time_adamix(sizes: Sizes) -> list[dict[str, Any]]:
    base, batch = partial(llama.make_base, sizes.small), llama.make_batch(sizes.small, *sizes.batch, sizes.device)
    steps = layers.adamix_steps(sizes.few_layers, torch.bfloat16, sizes.device, base, batch)
    return layers.compare("adamix-lora", steps, sizes.repeats, sizes.device, layers=sizes.few_layers)


def decode_small(sizes: Sizes) -> list[dict[str, Any]]:
    return llama.decode(sizes.small, sizes.small.layers, (1,), sizes.repeats, sizes.device, sizes.peak)


def train_one_b(sizes: Sizes) -> dict[str, Any]:
    return llama.train_whole(sizes.one_b, sizes.batch, _some(sizes, 7), sizes.device, sizes.peak)


def train_eight_b(sizes: Sizes) -> dict[str, Any]:
    return llama.train_part(sizes.eight_b, sizes.few_blocks, sizes.batch, _some(sizes, 5), sizes.device, sizes.peak)


def decode_one_b(sizes: Sizes) -> list[dict[str, Any]]:
    return llama.decode(sizes.one_b, sizes.one_b.layers, (1, 32), sizes.repeats, sizes.device, sizes.peak)


def decode_eight_b(sizes: Sizes) -> list[dict[str, Any]]:
    """The larger number of blocks alone."""
    return llama.decode(sizes.eight_b, max(sizes.few_blocks), (1, 32), sizes.repeats, sizes.device, sizes.peak)


def time_linears(sizes: Sizes) -> list[dict[str, Any]]:
    """A linear of the 8B shape with all kernels over R / K."""
    width, tokens = sizes.eight_b.width, sizes.batch[0] * sizes.batch[1]
    return [
        llama.time_linear(width, rank, tokens, sizes.repeats, sizes.device, sizes.peak) for rank in sizes.joined_ranks
    ]


def _some(sizes: Sizes, most: int) -> int:
    return min(sizes.repeats, most)


# name, what it runs, its budget in seconds: 585 in all
SECTIONS: list[tuple[str, Callable[[Sizes], Any], int]] = [
    ("environment", describe_environment, 10),
    ("kernel parity", check_kernels, 30),
    ("joint parity", check_joint, 40),
    ("training step, 1B", train_one_b, 90),
    ("training step, 8B", train_eight_b, 90),
    ("linears", time_linears, 50),
    ("decoding, 1B", decode_one_b, 60),
    ("decoding, 8B", decode_eight_b, 40),
    ("kernels", time_kernels, 50),
    ("training step, 135M", train_small, 50),
    ("decoding, 135M", decode_small, 25),
    ("fused loss", time_fused_loss, 20),
    ("adamix", time_adamix, 30),
]


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """`TimeoutError` inside when the time is over."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"took more than its {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_section(run: Callable[[Sizes], Any], sizes: Sizes, budget: int) -> dict[str, Any]:
    """What it found, or its error, and its seconds."""
    if sizes.device == "cuda" and not torch.cuda.is_available():
        return {"skipped": "no CUDA device"}
    start = time.monotonic()
    try:
        with limited(budget):
            found = {"found": run(sizes)}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc(limit=-3)}
    # a measurement that is stopped leaves it off
    gc.enable()
    gc.collect()
    if sizes.device == "cuda":
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.monotonic() - start, 1), "budget": budget}


def run_all(sizes: Sizes, out: Path) -> dict[str, Any]:
    """All sections, into `out`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    command = shlex.join(["python", "-m", "benchmarks.gpu.run", *sys.argv[1:]])
    found: dict[str, Any] = {"date": str(date.today()), "command": command, "sections": {}}
    for name, run, budget in SECTIONS:
        found["sections"][name] = section = run_section(run, sizes, budget)
        out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {section.get('error') or section.get('skipped') or section['seconds']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=RESULTS / f"gpu-{date.today()}.json")
    options = parser.parse_args()
    run_all(make_tiny(options.device) if options.tiny else Sizes(options.device), options.out)


if __name__ == "__main__":
    main()
