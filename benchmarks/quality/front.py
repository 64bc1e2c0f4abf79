"""Quality beside cost: which methods no other one beats in both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.plotting import COLOURS, make_figure
from benchmarks.quality.results import Results
from benchmarks.quality.standings import Standing, stand
from benchmarks.quality.table import read_table

COSTS = {"ratio": "time of a step", "memory_ratio": "memory of a step"}


def draw_front(results: Results, costs: Path) -> Figure:
    """The score of each method over its cost beside the reference's, a panel for time and one for memory.

    `costs`: a file of `measure_costs`, whose data set's scores are shown. A line joins what nothing beats in both.
    """
    table, found = read_table(results.name), json.loads(costs.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    standings = stand(results, found["data"])
    figure = make_figure(9.0, 4.2, f"{table.title}: {found['data']}, {table.metrics[found['data']]}")
    for axis, (cost, label) in zip(figure.subplots(1, 2, sharey=True), COSTS.items(), strict=True):
        _draw_panel(axis, standings, {name: row[cost] for name, row in rows.items()})
        axis.set_xlabel(f"{label} / {table.reference}", fontsize=9)
    return figure


def _draw_panel(axis: Axes, standings: Mapping[str, Standing], costs: Mapping[str, float]) -> None:
    known = {name: standing for name, standing in standings.items() if name in costs}
    best = find_front({name: (costs[name], _gain(standing)) for name, standing in known.items()})
    for name, standing in known.items():
        point: Any = costs[name], standing.estimate.mean
        axis.errorbar(*point, yerr=standing.estimate.half, fmt="o", color=COLOURS[name in best], capsize=2)
        axis.annotate(name, point, xytext=(4, 4), textcoords="offset points", fontsize=8)
    axis.plot([costs[name] for name in best], [known[name].estimate.mean for name in best], color=COLOURS[1], alpha=0.5)
    axis.grid(alpha=0.3)


def _gain(standing: Standing) -> float:
    return -standing.estimate.mean if standing.is_better_low else standing.estimate.mean


def find_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names, by rising cost, of (cost, gain) that no other point has cheaper and better."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front
