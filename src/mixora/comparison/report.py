"""Results for people and machines: `comparison.json`, `comparison.html` with its plots, and tables for a terminal."""

import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mixora.comparison.matching import Matched
from mixora.comparison.matrix import Matrix
from mixora.comparison.plot import plot_front
from mixora.comparison.results import Results, find_cheapest
from mixora.comparison.wording import format_estimate, judge, remark, tabulate
from mixora.diagnostics.page import write_code, write_figure, write_fold, write_page, write_section, write_table
from mixora.diagnostics.plots import save_png

COST = 4  # the column from which on the table tells what a method costs
PAGE, RECORD = "comparison.html", "comparison.json"


def write_results(results: Results, command: str) -> Path:
    """Write page, record and plots into the folder of the comparison, over those of an earlier call; gives the page."""
    folder = Path(results.matrix.comparison.out)
    folder.mkdir(parents=True, exist_ok=True)
    record = {**results.to_dict(), "words": [*judge(results), *remark(results)], "command": command}
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
    drawn = {
        data: save_png(plot_front(results, data), folder / f"pareto-{data}.png").read_bytes()
        for data in results.standings
    }
    (folder / PAGE).write_text(render(results, drawn, command), encoding="utf-8")
    return folder / PAGE


def render(results: Results, drawn: Mapping[str, bytes], command: str) -> str:
    """The page as text; `drawn` holds a PNG for each data set."""
    comparison = results.matrix.comparison
    sections = [f'<p class="verdict">{escape(words)}</p>' for words in judge(results)]
    sections += [f"<p>{escape(words)}</p>" for words in remark(results)]
    for data in results.standings:
        table = write_table(tabulate(results, data), numeric=_numeric(results, data))
        metrics = write_fold(
            "All metrics", write_table(_all_metrics(results, data), numeric=list(results.standings[data]))
        )
        sections.append(write_section(data, table + write_figure(drawn.get(data), _caption(results, data)) + metrics))
    failures = "".join(f"<p>{escape(name)}</p>{write_code(tail)}" for name, tail in results.problems.items())
    sections += [
        write_section("Failed runs", failures),
        write_section("How the methods were matched", _write_matching(results.matrix)),
        write_section("Runs", write_fold(f"{len(results.records)} finished", write_table(_runs(results)))),
        write_section("How it was made", write_code(command)),
    ]
    seeds = len(comparison.seed_list)
    subtitle = f"{comparison.model.base} · {len(comparison.methods)} methods · {seeds} seed{'s' * (seeds > 1)}"
    return write_page(comparison.title, subtitle, sections)


def summarise(results: Results) -> Iterator[Table | str]:
    """The end of a comparison, for a terminal."""
    for data in results.standings:
        rows = tabulate(results, data)
        titles = (f"{data}: mean ± 95 % interval over the seeds", f"{data}: parameters, and costs as means")
        for title, columns in zip(titles, (list(rows[0])[:COST], ["method", *list(rows[0])[COST:]]), strict=True):
            yield _make_table(title, [{name: row[name] for name in columns} for row in rows], left=("method",))
    yield from judge(results)
    yield from remark(results)


def show_matrix(matrix: Matrix, missing: list[str]) -> Iterator[Table | str]:
    """What would be run, for a terminal: the settings found for each method, and which runs are missing."""
    for rows in _group_matching(matrix).items():
        yield _make_table(
            f"matched on {', '.join(rows[0])}", [_matching_row(m, matrix) for m in rows[1]], left=("method", "chosen")
        )
    seeds = ", ".join(map(str, matrix.comparison.seed_list))
    yield (
        f"{len(matrix.runs)} runs: {len(matrix.comparison.methods)} methods x seeds {seeds} x "
        f"data {', '.join(matrix.comparison.data)}; {len(matrix.runs) - len(missing)} are finished"
    )


def _make_table(title: str, rows: list[dict[str, str]], left: tuple[str, ...]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="left" if column in left else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def _group_matching(matrix: Matrix) -> dict[tuple[str, ...], list[Matched]]:
    """The methods as matched, by the data sets that they were matched alike on."""
    groups: dict[int, list[str]] = {}
    for data, methods in matrix.matched.items():
        groups.setdefault(id(methods), []).append(data)
    return {tuple(names): list(matrix.matched[names[0]].values()) for names in groups.values()}


def _matching_row(matched: Matched, matrix: Matrix) -> dict[str, str]:
    reference = next(iter(matrix.matched.values()))[matrix.comparison.reference]
    match = matrix.comparison.match
    count = {"trainable": matched.trainable, "active": matched.active}
    target = {"trainable": reference.trainable, "active": reference.active}
    row = {"method": matched.method, "chosen": matched.chosen}
    for name, number in count.items():
        share = f" ({number / target[name] - 1:+.1%})" if match and match.parameters == name else ""
        row[name] = f"{number:,}{share}"
    return row


def _write_matching(matrix: Matrix) -> str:
    match = matrix.comparison.match
    words = "Every method as it is given; parameters are not matched."
    if match is not None:
        words = (
            f"As many {match.parameters} parameters of the adapter as {matrix.comparison.reference}, within "
            f"{match.tolerance:.1%}; the factor in front of a method's experts stays what it is at its own rank. "
            "The tables above count new classification heads too."
        )
    tables = [
        write_table([_matching_row(m, matrix) for m in group], numeric=("trainable", "active"))
        for group in _group_matching(matrix).values()
    ]
    return f"<p>{escape(words)}</p>" + "".join(tables)


def _numeric(results: Results, data: str) -> list[str]:
    return [column for column in tabulate(results, data)[0] if column != "method"]


def _all_metrics(results: Results, data: str) -> list[dict[str, str]]:
    standings = results.standings[data]
    metrics = dict.fromkeys(name for standing in standings.values() for name in standing.scores)
    return [
        {
            "metric": metric.replace("_", " "),
            **{name: format_estimate(s.scores[metric].estimate, metric) for name, s in standings.items()},
        }
        for metric in metrics
    ]


def _runs(results: Results) -> list[dict[str, Any]]:
    rows = []
    for run in results.matrix.runs:
        if run.name in results.records:
            record = results.records[run.name]
            metric = results.metric[run.data]
            row = {"run": run.name, metric: record.after.get(metric), **_costs(record.environment)}
            rows.append({**row, "folder": str(run.folder)})
    return rows


def _costs(environment: Mapping[str, Any]) -> dict[str, Any]:
    return {"train s": environment.get("train_seconds"), "device": environment.get("device")}


def _caption(results: Results, data: str) -> str:
    by_active, by_seconds = (", ".join(sorted(find_cheapest(results, data, cost))) for cost in ("active", "seconds"))
    return (
        f"{results.metric[data].replace('_', ' ')} against cost, better upwards; bars: 95 % intervals. Filled: "
        f"the mean is not dominated. By parameters a token uses: {by_active}; by seconds of training: {by_seconds}. "
        "Where intervals overlap, other seeds may change which methods these are."
    )
