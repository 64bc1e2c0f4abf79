"""Time and memory of the kernels, and the limits of `auto` in `mixora/kernels/choice.py` that follow from them.

One step is the experts of one site, forward and backward with all gradients, without the frozen module. Write the
limits that are printed into `choice.py`: a test compares them with the newest file in `benchmarks/results`.
"""

import argparse
import itertools
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.measuring import Step, compare, compare_memory
from benchmarks.running import run
from mixora.contracts import Shape
from mixora.kernels import KERNELS
from mixora.routing import Routing

WIDTHS = (576, 2048)
DTYPES = ("float32", "bfloat16")
RANKS = (4, 8, 12, 16, 24, 32, 64, 128, 512)
# limits are given in steps of this, since nothing finer can be measured
STEP = 8


@dataclass(frozen=True)
class Case:
    """One site. `skewed`: expert 0 is among the choices of every token, instead of an even load."""

    width: int
    dtype: str
    rank: int
    experts: int = 8
    top_k: int = 2
    tokens: int = 1024
    skewed: bool = False

    @property
    def breadth(self) -> float:
        """R / K."""
        return self.experts * self.rank / self.top_k

    @property
    def shape(self) -> Shape:
        return Shape(self.width, self.width, (self.rank,) * self.experts)


def kernels_for(case: Case) -> list[str]:
    dtype = getattr(torch, case.dtype)
    able = {name: kernel for name, kernel in KERNELS.items() if kernel.objection(case.shape, dtype) is None}
    # joint computes the experts as stacked does, and more than the experts
    return [name for name, kernel in able.items() if not kernel.joins]


def make_step(kernel_name: str, case: Case, device: str = "cpu") -> Step:
    """Forward and backward of a site's experts, on the same numbers each time; gives the output and all gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device)

    dtype, rank_sum = getattr(torch, case.dtype), case.experts * case.rank
    scores_TE = draw(case.tokens, case.experts)
    ranking_TE = scores_TE.index_fill(1, torch.tensor([0], device=device), torch.inf) if case.skewed else scores_TE
    experts_TK = ranking_TE.topk(case.top_k, dim=-1).indices
    x_TI, a_RI, b_RO, dy_TO = (draw(n, case.width).to(dtype) for n in (case.tokens, rank_sum, rank_sum, case.tokens))
    weights_TK = scores_TE.gather(1, experts_TK).softmax(dim=-1).requires_grad_()
    leaves = [x_TI.requires_grad_(), a_RI.requires_grad_(), b_RO.requires_grad_(), weights_TK]
    used_TK = torch.ones_like(weights_TK, dtype=torch.bool)
    routing = Routing(experts_TK, weights_TK, used_TK, used_TK, used_TK[:, 0], case.experts)
    kernel = KERNELS[kernel_name](case.shape.ranks)

    def step() -> object:
        y_TO = kernel.contract(kernel.expand(x_TI, a_RI, routing), b_RO, routing)
        return y_TO, *torch.autograd.grad(y_TO, leaves, dy_TO)

    return step


def measure_speed(cases: Iterable[Case], repeats: int, device: str = "cpu") -> list[dict]:
    """Milliseconds of every kernel that can serve a case, and their ratio to those of `sorted`."""
    rows = []
    for case in cases:
        found = compare({name: make_step(name, case, device) for name in kernels_for(case)}, "sorted", repeats, device)
        rows.append({**vars(case), "breadth": case.breadth, **_transpose(found)})
        medians = "  ".join(f"{name} {ms:9.3f}" for name, ms in rows[-1]["ms"].items())
        print(f"{case.dtype:>9} width {case.width:4} R/K {case.breadth:6.0f}  {medians}", flush=True)
    return rows


def measure_growth(changes: dict[str, tuple[Case, Case]], repeats: int) -> list[dict]:
    """Time and peak memory of each second case over those of the first, in milliseconds and MiB."""
    rows = []
    for label, (before, after) in changes.items():
        for name in kernels_for(after):
            steps = {"before": make_step(name, before), "after": make_step(name, after)}
            times, peaks = compare(steps, "before", repeats), compare_memory(steps, "before")
            ratios = {"time": times["after"]["ratio"], "memory": peaks["after"]["memory_ratio"]}
            rows.append({"change": label, "kernel": name, **ratios, **_transpose(times), **_transpose(peaks)})
            print(f"{label:>22} {name:>8}: time x {ratios['time']:5.2f}, memory x {ratios['memory']:5.2f}", flush=True)
    return rows


def _transpose(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By figure, then by name."""
    figures = next(iter(found.values()))
    return {figure: {name: of_name[figure] for name, of_name in found.items()} for figure in figures}


def list_changes(most_tokens: int, rank: int = 32) -> dict[str, tuple[Case, Case]]:
    """What may grow: experts at the same rank and choice, tokens, and the share that one expert gets."""
    site = Case(576, "float32", rank)
    few = replace(site, tokens=256)
    return {
        "experts 8 to 64": (site, replace(site, experts=64)),
        f"tokens 256 to {most_tokens}": (few, replace(few, tokens=most_tokens)),
        "one expert gets all": (site, replace(site, skewed=True)),
    }


def find_limits(rows: list[dict]) -> dict[str, int]:
    """For each dtype, the R / K above which `stacked` takes longer than `sorted`.

    The logarithm of their ratio, its mean over the widths, is interpolated over the logarithm of R / K; the limit is
    where it becomes positive for good, rounded to a step.
    """
    return {dtype: _find_limit([row for row in rows if row["dtype"] == dtype]) for dtype in DTYPES}


def _find_limit(rows: list[dict]) -> int:
    losses: dict[float, list[float]] = {}
    for row in rows:
        losses.setdefault(row["breadth"], []).append(math.log(row["ms"]["stacked"] / row["ms"]["sorted"]))
    points = [(math.log(breadth), statistics.mean(found)) for breadth, found in sorted(losses.items())]
    lost = [n for n, (_, loss) in enumerate(points) if loss <= 0]
    if not lost or lost[-1] + 1 == len(points):
        raise ValueError("stacked and sorted do not cross within the ranks that were measured")
    (x0, y0), (x1, y1) = points[lost[-1] : lost[-1] + 2]
    return round(math.exp(x0 - y0 * (x1 - x0) / (y1 - y0)) / STEP) * STEP


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--tokens", type=int, default=8192, help="the most tokens that 256 are compared with")


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    speed = measure_speed([Case(w, d, r) for d in DTYPES for w in WIDTHS for r in RANKS], options.repeats)
    growth = measure_growth(list_changes(options.tokens), options.repeats)
    limits = find_limits(speed)
    print(f"limits: {limits}")
    return {"limits": limits, "speed": speed, "growth": growth}


def draw(found: dict[str, Any]) -> Any:
    """Time over that of `sorted`, by R / K: where `stacked` crosses 1, `auto` changes."""
    from benchmarks.plotting import draw_curves, make_figure, mark

    figure = make_figure(10.0, 7.0, "Experts of one site, 1024 tokens: time / kernel sorted")
    axes = figure.subplots(len(DTYPES), len(WIDTHS), sharex=True, sharey=True)
    for axis, (dtype, width) in zip(axes.flat, itertools.product(DTYPES, WIDTHS), strict=True):
        rows = [row for row in found["speed"] if (row["dtype"], row["width"]) == (dtype, width)]
        names = [name for name in KERNELS if any(name in row["ms"] for row in rows)]
        curves = {name: [_pick(row, name) for row in rows if name in row["ms"]] for name in names}
        draw_curves(axis, curves, list(KERNELS), "breadth")
        axis.axvline(found["limits"][dtype], color="black", linestyle="--", linewidth=1)
        axis.set_title(f"{dtype}, width {width}; limit {found['limits'][dtype]}", fontsize=10)
        mark(axis.xaxis, [row["breadth"] for row in rows][::2])
        mark(axis.yaxis, (0.25, 0.5, 1, 2, 4, 8))
    axes[0, 0].legend(frameon=False)
    for axis in axes[-1]:
        axis.set_xlabel("R / K")
    return figure


def _pick(row: dict[str, Any], name: str) -> dict[str, Any]:
    return {"breadth": row["breadth"], **{figure: row[figure][name] for figure in ("ratio", "ratio_quartiles")}}


if __name__ == "__main__":
    run("kernels")
