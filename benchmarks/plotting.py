"""Figures of benchmarks: ratios with their quartiles beside a line at what they are compared with, and curves.

Colours are Okabe and Ito's, which stay apart under every common form of colour blindness; markers differ too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P")
Row = dict[str, Any]


def draw_ratios(
    rows: Sequence[Row], facts: Sequence[str], title: str, label: str, ratio: str = "ratio", unit: str = "ms"
) -> Figure:
    """A panel for each set of `facts`, in it a point with its quartiles for each variant, and a line at 1."""
    panels: dict[str, list[Row]] = {}
    for row in rows:
        panels.setdefault(", ".join(name_fact(fact, row[fact]) for fact in facts if fact in row), []).append(row)
    figure = make_figure(9.0, 1.2 + sum(0.55 + 0.32 * len(found) for found in panels.values()), title)
    heights = [len(found) + 1 for found in panels.values()]
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (name, found) in zip(axes, panels.items(), strict=True):
        axis.set_title(name, loc="left", fontsize=10)
        _draw_points(axis, found, ratio, unit)
    axes[-1].set_xlabel(f"{label} (median and quartiles; the line is 1.00)")
    return figure


def name_fact(fact: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{fact} {value}"


def _draw_points(axis: Axes, rows: Sequence[Row], ratio: str, unit: str) -> None:
    middles = [row[ratio] for row in rows]
    axis.axvline(1.0, color="black", linewidth=1.0, linestyle="--", zorder=0)
    axis.errorbar(
        middles, range(len(rows)), xerr=_whiskers(rows, ratio), fmt="o", color=COLOURS[0], ecolor=COLOURS[1], capsize=3
    )
    for n, row in enumerate(rows):
        text = f"{row[ratio]:.2f}   {_round(row[unit])} {'MiB' if unit == 'mebibytes' else unit}"
        axis.annotate(text, (1.01, n), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)


def draw_curves(
    axis: Axes, curves: Mapping[str, Sequence[Row]], names: Sequence[str], x: str, y: str = "ratio"
) -> None:
    """A curve with quartiles for each name, over `x`, on two logarithmic scales; `names`: those of the whole figure."""
    for name, rows in curves.items():
        n = names.index(name)
        axis.errorbar(
            [row[x] for row in rows],
            [row[y] for row in rows],
            yerr=_whiskers(rows, y),
            marker=MARKERS[n % len(MARKERS)],
            color=COLOURS[n % len(COLOURS)],
            markersize=4,
            capsize=3,
            label=name,
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.grid(alpha=0.3)


def mark(scale: Axis, at: Iterable[float]) -> None:
    """Plain numbers at these places of a logarithmic scale."""
    scale.set_major_locator(FixedLocator(sorted(set(at))))
    scale.set_minor_locator(NullLocator())
    scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def make_figure(width: float, height: float, title: str) -> Figure:
    """In inches, but no narrower than its title. Without pyplot, so that nothing needs a display."""
    figure = Figure((max(width, 0.1 * len(title)), height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    return figure


def _whiskers(rows: Sequence[Row], ratio: str) -> list[list[float]]:
    """From the median down and up to the quartiles."""
    ends = [(row[ratio], *row[f"{ratio}_quartiles"]) for row in rows]
    return [[middle - low for middle, low, _ in ends], [high - middle for middle, _, high in ends]]


def _round(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
