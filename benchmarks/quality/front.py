"""Quality beside cost: which methods no other one beats in both."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from benchmarks.plotting import COLOURS, make_figure
from benchmarks.quality.results import Results
from benchmarks.quality.standings import Standing, stand
from benchmarks.quality.table import read_table

COSTS = {"ratio": "time of a step", "memory_ratio": "memory of a step"}
# of a name, in points from its point
PLACES = [(x, y) for y in (5, -7, 17, -19, 29, -31, 41, -43) for x in (5, -5)]


def draw_front(results: Results, costs: Path) -> Figure:
    """The score of each method over its cost beside the reference's, a panel for time and one for memory.

    `costs`: a file of `measure_costs`, whose data set's scores are shown. A line joins what nothing beats in both.
    """
    table, found = read_table(results.name), json.loads(costs.read_text())
    rows = {row["method"]: row for row in found["rows"]}
    standings = stand(results, found["data"])
    figure = make_figure(9.0, 4.2, f"{table.title}: {found['data']}, {table.metrics[found['data']]}")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, (cost, label) in zip(panels, COSTS.items(), strict=True):
        _draw_panel(axis, standings, {name: row[cost] for name, row in rows.items()})
        axis.set_xlabel(f"{label} / {table.reference}", fontsize=9)
    figure.draw_without_rendering()  # from here on points have places on the page
    for axis, cost in zip(panels, COSTS, strict=True):
        _name_points(
            axis, {name: (row[cost], standings[name].estimate.mean) for name, row in rows.items() if name in standings}
        )
    return figure


def _draw_panel(axis: Axes, standings: Mapping[str, Standing], costs: Mapping[str, float]) -> None:
    known = {name: standing for name, standing in standings.items() if name in costs}
    best = find_front({name: (costs[name], _gain(standing)) for name, standing in known.items()})
    for name, standing in known.items():
        point: Any = costs[name], standing.estimate.mean
        axis.errorbar(*point, yerr=standing.estimate.half, fmt="o", color=COLOURS[name in best], capsize=2)
    axis.plot([costs[name] for name in best], [known[name].estimate.mean for name in best], color=COLOURS[1], alpha=0.5)
    axis.grid(alpha=0.3)
    axis.margins(x=0.2)


def _name_points(axis: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """A name beside each point, at the first place where no other name and no point is."""
    marks, taken = axis.transData.transform(list(points.values())), list[Bbox]()
    for name, point in sorted(points.items(), key=lambda item: item[1]):
        for x, y in PLACES:
            side: Any = {"ha": "left" if x > 0 else "right", "va": "center"}
            note = axis.annotate(name, point, xytext=(x, y), textcoords="offset points", fontsize=8, **side)
            box = note.get_window_extent()
            if not any(box.overlaps(other) for other in taken) and not any(box.contains(*mark) for mark in marks):
                taken.append(box)
                break
            note.remove()


def _gain(standing: Standing) -> float:
    return -standing.estimate.mean if standing.is_better_low else standing.estimate.mean


def find_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """The names, by rising cost, of (cost, gain) that no other point has cheaper and better."""
    front: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not front or points[name][1] > points[front[-1]][1]:
            front.append(name)
    return front
