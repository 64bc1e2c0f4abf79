"""What the tables take: trials made and to be made, with the minutes of one core that each is expected to take."""

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table as Grid

from benchmarks.quality.results import Results, cells
from benchmarks.quality.table import read_table


def print_plan(names: Sequence[str]) -> None:
    """A line for each table and data set."""
    grid = Grid("table", "data", "methods", "trials", "made", "minutes each", "minutes in all", box=None)
    total = 0.0
    for name in names:
        table, results = read_table(name), Results(name)
        for data in table.data:
            methods = [method for of, method in cells(name) if of == data]
            each = len(table.rates_of(data)) + len(table.seed_list)
            made, seconds = _look(results, data, methods)
            minutes = statistics.median(seconds) / 60 if seconds else table.minutes
            total += minutes * each * len(methods)
            row = (len(methods), each * len(methods), made, f"{minutes:.1f}", f"{minutes * each * len(methods):.0f}")
            grid.add_row(name, data, *map(str, row))
    console = Console()
    console.print(grid)
    console.print(f"{total:.0f} minutes of one core, {total / 120:.1f} hours of two")


def _look(results: Results, data: str, methods: Sequence[str]) -> tuple[int, list[float]]:
    """How many trials were made, and the seconds that those took which say so."""
    lines = [line for line in results.lines() if line["data"] == data and line["method"] in methods]
    return len(lines), [line["total_seconds"] for line in lines]
