"""How time and memory of one linear with experts and router grow, kernel `auto` choosing for each size.

Width 576, K = 2, forward and backward, for experts of rank 8 and 32:

- `experts`: 8 to 64 of one rank; and with R, the sum of their ranks, fixed at 512.
- `tokens`: 256 to 8192.
- `load`: an even one, and one where expert 0 serves every token.

A ratio is to the smallest size, within a turn.
"""

import argparse
from dataclasses import replace
from typing import Any

from benchmarks.kernels import Case
from benchmarks.layers import make_linear, make_step
from benchmarks.measuring import compare, compare_memory, tabulate
from benchmarks.running import add_dtypes

EXPERTS = (8, 16, 32, 64)
TOKENS = (256, 512, 1024, 2048, 4096, 8192)
RANKS = (8, 32)
RANK_SUM = 512


def list_series(dtype: str, most_tokens: int) -> dict[tuple[str, str], dict[float, Case]]:
    """By what grows and what is fixed, the cases by size."""
    found: dict[tuple[str, str], dict[float, Case]] = {}
    for rank in RANKS:
        site, fixed = Case(576, dtype, rank), f"rank {rank}"
        found["experts", fixed] = {experts: replace(site, experts=experts) for experts in EXPERTS}
        found["tokens", fixed] = {tokens: replace(site, tokens=tokens) for tokens in TOKENS if tokens <= most_tokens}
        found["load", fixed] = {1: site, 2: replace(site, skewed=True)}
    by_rank_sum = {n: Case(576, dtype, RANK_SUM // n, experts=n) for n in EXPERTS}
    found["experts", f"R {RANK_SUM}"] = by_rank_sum
    return found


def name_size(grows: str, size: float) -> str:
    return {1: "even", 2: "one gets all"}[int(size)] if grows == "load" else f"{size:g} {grows}"


def measure(dtype: str, most_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each size of each series."""
    rows = []
    for (grows, fixed), cases in list_series(dtype, most_tokens).items():
        steps = {name_size(grows, size): make_step(*make_linear(case)) for size, case in cases.items()}
        smallest = next(iter(steps))
        times, peaks = compare(steps, smallest, repeats), compare_memory(steps, smallest)
        found = tabulate(
            {name: {**times[name], **peaks[name]} for name in steps}, dtype=dtype, grows=grows, fixed=fixed
        )
        rows += [{**row, "size": size} for row, size in zip(found, cases, strict=True)]
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dtypes(parser)
    parser.add_argument("--tokens", type=int, default=TOKENS[-1], help="the most")
    parser.add_argument("--repeats", type=int, default=25)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    return {"rows": [row for dtype in options.dtype for row in measure(dtype, options.tokens, options.repeats)]}


def draw(found: dict[str, Any]) -> Any:
    """Time above memory, beside each other by what grows, with a line for growth in proportion."""
    from benchmarks.plotting import make_figure

    figure = make_figure(11.0, 7.0, "One linear with experts: growth with its size")
    axes = figure.subplots(2, 3)
    names = list(dict.fromkeys(name_curve(row) for row in found["rows"]))
    for column, grows in zip(axes.T, ("experts", "tokens", "load"), strict=True):
        rows = [row for row in found["rows"] if row["grows"] == grows]
        for axis, figure_name in zip(column, ("ratio", "memory_ratio"), strict=True):
            draw_growth(axis, rows, grows, figure_name, names)
    for axis, what in zip(axes[:, 0], ("time", "peak memory"), strict=True):
        axis.set_ylabel(f"{what} / smallest size")
    axes[0, 0].legend(frameon=False, fontsize=8)
    return figure


def name_curve(row: dict[str, Any]) -> str:
    return f"{row['dtype']}, {row['fixed']}"


def draw_growth(axis: Any, rows: list[dict[str, Any]], grows: str, ratio: str, names: list[str]) -> None:
    from benchmarks.plotting import draw_curves, mark

    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(name_curve(row), []).append(row)
    draw_curves(axis, curves, names, "size", ratio)
    sizes = sorted({row["size"] for row in rows})
    mark(axis.xaxis, sizes)
    if grows == "load":
        axis.set_xticks(sizes, [name_size(grows, size) for size in sizes])
        axis.set_xlim(0.8, 2.5)
        axis.set_ylim(0.45, 2.2)
    else:
        axis.plot(sizes, [size / sizes[0] for size in sizes], "k--", linewidth=1, label="in proportion")
    mark(axis.yaxis, (0.5, 1, 2, 4, 8, 16, 32))
    axis.set_title(grows, fontsize=10)
