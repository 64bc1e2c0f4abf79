"""Writes the tables of `docs/evidence.md` between their marks, and the plots beside it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.plotting import COLOURS, MARKERS, make_figure
from benchmarks.quality.costs import read_costs
from benchmarks.quality.front import draw_front
from benchmarks.quality.results import RESULTS, Results, is_complete
from benchmarks.quality.standings import Standing, stand
from benchmarks.quality.table import Rates, read_table, table_names
from mixora.comparison.wording import format_estimate
from mixora.diagnostics.page import NOTHING

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "evidence.md"
PLOTS = ROOT / "docs" / "evidence"
MARKED = re.compile(r"(<!-- table ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
Found = dict[str, dict[str, Standing]]
SIGNS = {"better": " ▲", "worse": " ▼", "": ""}


def write_page(page: Path = PAGE, plots: Path = PLOTS, folder: Path = RESULTS) -> None:
    """Put the newest results into the page; what stands outside of the marks stays."""
    text = page.read_text(encoding="utf-8")
    page.write_text(fill(text, folder), encoding="utf-8")
    plots.mkdir(exist_ok=True)
    for name in table_names():
        results = Results(name, folder)
        is_shown = name in (found for _, found, _ in MARKED.findall(text))
        if is_shown and any(is_complete(results, data) for data in read_table(name).data):
            _save(draw_differences(results), plots / f"{name}.svg")
            if costs := read_costs(name, folder):
                _save(draw_front(results, costs), plots / f"{name}-front.svg")


def _save(figure: Figure, path: Path) -> None:
    """The same bytes for the same results."""
    with rc_context({"svg.hashsalt": path.stem}):
        figure.savefig(path, metadata={"Date": None})


def fill(text: str, folder: Path = RESULTS) -> str:
    """The page with the tables of the newest results."""
    return MARKED.sub(lambda found: f"{found[1]}\n{tabulate(Results(found[2], folder))}\n{found[3]}", text)


def tabulate(results: Results) -> str:
    """What the final trials gave, then the learning rates; as Markdown."""
    table = read_table(results.name)
    known = {data: stand(results, data) for data in table.data if is_complete(results, data)}
    if not known:
        return "Its trials are not all made yet.\n"
    lines = [
        *_score_lines(results, list(_columns(results, known))),
        "",
        *_rate_lines(results, list(known)),
        "",
        *_specialist_lines(results, known),
    ]
    return "\n".join(lines).rstrip() + "\n"


@dataclass(frozen=True)
class _Column:
    """One metric on the rows of one split of a data set."""

    head: str
    data: str
    metric: str
    standings: dict[str, Standing]


def _columns(results: Results, known: Found) -> Iterator[_Column]:
    """What tells runs apart, beside it what else was measured; then other splits."""
    table = read_table(results.name)
    for data, standings in known.items():
        yield _Column(f"{data}, {_tell(table.metrics[data])}", data, table.metrics[data], standings)
        for metric in table.beside.get(data, ()):
            yield _Column(f"{data}, {_tell(metric)}", data, metric, stand(results, data, metric=metric))
    for data in known:
        if data in table.also:
            split = stand(results, data, also=True)
            yield _Column(f"{data}, {_tell(table.also[data])}", data, table.metrics[data], split)


def _score_lines(results: Results, columns: list[_Column]) -> Iterator[str]:
    yield _row("method", "parameters: trained, active", *(column.head for column in columns))
    yield _row("---", *("---:" for _ in range(1 + len(columns))))
    data = list(dict.fromkeys(column.data for column in columns))
    for name in dict.fromkeys(name for column in columns for name in column.standings):
        cells = [_cell(results, column, name) for column in columns]
        yield _row(name, _count(results, data, name.split(",")[0]), *cells)


def _tell(name: str) -> str:
    return name.replace("_", " ")


def _cell(results: Results, column: _Column, name: str) -> str:
    standing = column.standings.get(name)
    if standing is None:
        return NOTHING
    # a mean over the seeds that did not come apart is no mean over all
    count, seeds = standing.estimate.n, len(read_table(results.name).seed_list)
    left_out = f" ({count} of {seeds} seeds)" if count < seeds else ""
    return format_estimate(standing.estimate, column.metric) + SIGNS[standing.verdict] + left_out


def _count(results: Results, data: list[str], method: str) -> str:
    """The mean over the final trials: where an allocator looks at weights or rows, the matching cannot tell."""
    lines = [line for of in data for line in results.finals(of, method).values()]
    return ", ".join(f"{fmean(line[key] for line in lines) / 1e6:.2f} M" for key in ("trainable", "active"))


def _rate_lines(results: Results, data: list[str]) -> Iterator[str]:
    table = read_table(results.name)
    more = "".join(f", on {of} {_list(rates)} too" for of, rates in table.more_rates.items() if of in data)
    yield f"Learning rates, of {_list(table.learning_rates)}{more}; in brackets the validation score of each:"
    yield ""
    yield _row("method", *data)
    yield _row("---", *("---" for _ in data))
    for method in table.methods:
        yield _row(method.name, *(_tell_rate(results, of, method.name) for of in data))


def _list(rates: Rates) -> str:
    return ", ".join(f"{rate:g}" for rate in rates)


def _tell_rate(results: Results, data: str, method: str) -> str:
    scores = results.tuning(data, method)
    best = results.best_rate(data, method)
    said = ", ".join("diverged" if score is None else f"{score:.3g}" for score in scores.values())
    return NOTHING if best is None else f"{best:g} ({said})"


def _specialist_lines(results: Results, known: Found) -> Iterator[str]:
    table = read_table(results.name)
    if table.group_by is None:
        return
    yield (
        f"Mutual information of expert and {table.group_by} in nats, mean over sites, before and after training; a "
        "permutation test over the rows of each seed:"
    )
    yield ""
    yield _row("method", "data", "untrained", "trained", "by chance", "largest p")
    yield _row("---", "---", "---:", "---:", "---:", "---:")
    for data in known:
        for method in table.methods:
            found = [line["specialisation"] for line in results.finals(data, method.name).values()]
            found = [of_seed for of_seed in found if of_seed["sites"]]
            if found:
                nats = [sum(of[key] for of in found) / len(found) for key in ("untrained", "information", "by_chance")]
                yield _row(
                    method.name, data, *(f"{value:.4f}" for value in nats), f"{max(of['p'] for of in found):.3f}"
                )


def draw_differences(results: Results) -> Figure:
    """Each method's difference to the reference, with its interval, a panel for each data set."""
    table = read_table(results.name)
    known = {data: stand(results, data) for data in table.data if is_complete(results, data)}
    known = {data: standings for data, standings in known.items() if any(s.difference for s in standings.values())}
    names = list(dict.fromkeys(n for standings in known.values() for n, s in standings.items() if s.difference))
    figure = make_figure(2.2 + 2.0 * max(1, len(known)), 1.2 + 0.3 * max(1, len(names)), table.title)
    axes = figure.subplots(1, max(1, len(known)), sharey=True, squeeze=False)[0]
    for axis, (data, standings) in zip(axes, known.items(), strict=False):
        axis.axvline(0.0, color="black", linewidth=1.0, linestyle="--", zorder=0)
        for place, name in enumerate(names):
            standing = standings.get(name)
            if standing is None or standing.difference is None:
                continue
            sign = -1 if standing.is_better_low else 1
            colour = COLOURS[("", "worse", "better").index(standing.verdict)]
            axis.errorbar(
                sign * standing.difference.mean,
                place,
                xerr=standing.difference.half,
                fmt=MARKERS[("", "worse", "better").index(standing.verdict)],
                color=colour,
                capsize=3,
            )
        axis.set_title(f"{data}\n{_tell(table.metrics[data])}", fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.grid(axis="x", alpha=0.3)
        axis.tick_params(axis="x", labelsize=8)
        axis.locator_params(axis="x", nbins=4)
    figure.supxlabel(f"better than {table.reference} to the right; 95 % of paired differences", fontsize=9)
    return figure


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
