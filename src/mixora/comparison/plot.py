"""The Pareto plot: what each method reaches, against what it costs."""

import math

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from mixora.comparison.results import Cost, Results, Standing, find_cheapest, is_better_low
from mixora.diagnostics.plots import COLOURS, WIDTH

LABELS: dict[Cost, str] = {"active": "parameters a token uses", "seconds": "seconds of training"}
MARKERS = "osD^vP*X"
PANEL, LEGEND_ROW = 2.9, 0.24  # inches


def plot_front(results: Results, data: str) -> Figure:
    """The metric with its intervals against each cost that is known; filled: not dominated.

    Colour and shape tell methods. A step line joins what is not dominated: whatever lies on its worse side costs more
    without being better.
    """
    standings = results.standings[data]
    costs: list[Cost] = ["active"]
    if all(standing.seconds is not None for standing in standings.values()):
        costs.append("seconds")
    rows = math.ceil(len(standings) / 2)
    figure = Figure(figsize=(WIDTH, len(costs) * PANEL + rows * LEGEND_ROW), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(costs), 1, squeeze=False)[:, 0]
    for axes, cost in zip(panels, costs, strict=True):
        _draw(axes, standings, results.metric[data], cost, find_cheapest(results, data, cost))
    handles, labels = panels[0].get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower left", ncols=2, frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _draw(axes: Axes, standings: dict[str, Standing], metric: str, cost: Cost, front: set[str]) -> None:
    points = {}
    for place, (name, standing) in enumerate(standings.items()):
        score = standing.scores[metric].estimate
        if score is None:
            continue
        points[name] = getattr(standing, cost), score.mean
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(
            *points[name],
            yerr=score.half or None,
            color=colour,
            marker=MARKERS[place % len(MARKERS)],
            markerfacecolor=colour if name in front else "white",
            markersize=7,
            linestyle="none",
            capsize=3,
            label=name,
        )
    steps = sorted(points[name] for name in front)
    axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color="#767676", linewidth=1, zorder=0)
    if is_better_low(metric):
        axes.invert_yaxis()  # better is up, whatever the metric
    axes.set_xlabel(LABELS[cost])
    axes.set_ylabel(metric.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
