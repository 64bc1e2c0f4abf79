"""Runs, routers and merges for a terminal: tables and the words around them."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mixora.diagnostics.page import format_value
from mixora.diagnostics.record import RunRecord
from mixora.diagnostics.report import summarise
from mixora.diagnostics.verdict import judge_routers
from mixora.merging import Comparison, Merged
from mixora.planning.plan import common_prefix, star_layer
from mixora.training.tasks import scores_table


def summarise_run(record: RunRecord, out: Path) -> Iterator[RenderableType]:
    """The end of a run, for a terminal: text that wraps, and lines to copy as strings, which do not."""
    table = Table(
        "metric", "before", "after", "read back", title=f"{record.title}: {record.after['rows']:.0f} held-out rows"
    )
    for name in record.before:
        if name != "rows":
            read_back = (record.reloaded or {}).get(name)
            table.add_row(
                name.replace("_", " "),
                format_value(record.before[name], name),
                Text(format_value(record.after[name], name), style="green"),
                format_value(read_back, name),
            )
    yield table
    if record.tasks:
        columns = {"before": "before", "after": "after", "read back": "reloaded"}
        scores = {
            name: {label: task[column] for label, column in columns.items()} for name, task in record.tasks.items()
        }
        yield scores_table("each task; the scores above are their means", scores)
    for said in record.generations:
        block = Table.grid(padding=(0, 1))
        for name, text in said.items():
            block.add_row(Text(f"{name:>9}", style="bold"), text)
        yield block
        yield ""
    yield Text(summarise(record))
    for finding in judge_routers(record):
        yield Text(f"{finding.kind}: {finding.text}")
    yield f"adapter  {out / 'adapter'}\nreport   {out / 'report.html'}\nyours    {record.next_command}"


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """What `Trained.measure` found, for a terminal."""
    means = {name: value for name, value in metrics.items() if name != "tasks"}
    if "tasks" in metrics:
        each = {name: {"value": scores} for name, scores in metrics["tasks"].items()}
        return scores_table(title, {**each, "mean over tasks": {"value": means}})
    table = Table("metric", "value", title=title)
    for name, value in means.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if name == "rows" else f"{value:.4f}")
    return table


def routing_table(sites: list[dict[str, Any]]) -> Table:
    """What `mixora.inspect` found, for a terminal."""
    columns = ("load per expert, %", "per token", "entropy", "dropped", "dead")
    return _site_table(sites, columns, _routing_cells)


def _routing_cells(site: dict[str, Any]) -> tuple[str, ...]:
    load = " ".join(f"{100 * share:.0f}" for share in site["load"])
    entropy = "-" if site["entropy"] is None else f"{site['entropy']:.3f}"
    dead = ", ".join(map(str, site["dead_experts"])) or "none"
    return load, f"{site['experts_per_token']:.2f}", entropy, f"{site['dropped_share']:.1%}", dead


def residual_table(sites: list[dict[str, Any]]) -> Table:
    """What `mixora.residual_energy` found, for a terminal."""
    return _site_table(sites, ("beyond the rank per expert, %", "tokens", "rank"), _residual_cells)


def _residual_cells(site: dict[str, Any]) -> tuple[str, ...]:
    beyond = " ".join("-" if share is None else f"{100 * share:.1f}" for share in site["beyond_rank"])
    rank = "-".join(map(str, sorted({min(site["ranks"]), max(site["ranks"])})))
    return beyond, " ".join(map(str, site["tokens"])), rank


def _site_table(
    sites: list[dict[str, Any]], columns: Sequence[str], cells: Callable[[dict[str, Any]], tuple[str, ...]]
) -> Table:
    """A row of cells per site; the first column is text, the others are numbers."""
    prefix = common_prefix([site["path"] for site in sites])
    table = _open_table(len(sites), prefix)
    table.add_column("site", overflow="fold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for site in sites:
        table.add_row(site["path"].removeprefix(prefix + "."), *cells(site))
        for name, of_task in site.get("tasks", {}).items():
            table.add_row(f"  {name}", *cells(of_task))
    return table


def summarise_foreseen(form: str, methods: Mapping[str, str], out: Path | None) -> Iterator[RenderableType]:
    """What an export would do, for a terminal."""
    kinds = Counter((star_layer(path), method) for path, method in methods.items())
    table = Table("site", "number", "method", title=f"{len(methods)} sites", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for (kind, method), number in kinds.items():
        table.add_row(kind, str(number), method)
    yield table
    yield f"nothing was written; without --dry-run:\n{form}  {out}"


def summarise_merge(merged: Merged) -> Iterator[RenderableType]:
    """What was merged and what it changed, for a terminal."""
    prefix = common_prefix([row["sites"] for row in merged.rows()])
    table = _open_table(len(merged.sites), prefix)
    table.add_column("site", overflow="fold")
    for column in ("number", "method", "rank", "mean error", "largest error"):
        table.add_column(column, justify="right")
    for row in merged.rows():
        errors = f"{row['mean_error']:.3g}", f"{row['largest_error']:.3g}"
        table.add_row(row["sites"].removeprefix(prefix + "."), str(row["count"]), row["method"], row["rank"], *errors)
    yield table
    if merged.soup:
        members = ", ".join(map(str, merged.soup.members))
        yield f"soup of experts {members}: held-out loss {merged.soup.loss:.4f}, of all {merged.soup.loss_of_all:.4f}"
    if merged.changes:
        yield _tabulate(merged.changes)
    yield f"{merged.form}  {merged.out}"


def _tabulate(changes: Comparison) -> Table:
    table = Table("", "mixture", "merged", title=f"{changes.predictions} held-out predictions")
    table.add_row("loss", f"{changes.loss_of_mixture:.4f}", f"{changes.loss_of_merged:.4f}")
    table.add_row("difference of a logit, mean", "", f"{changes.mean_difference:.4g}")
    table.add_row("difference of a logit, largest", "", f"{changes.max_difference:.4g}")
    if changes.divergence is not None:
        table.add_row("KL divergence, nats", "", f"{changes.divergence:.4g}")
    return table


def _open_table(count: int, prefix: str) -> Table:
    """For so many sites, whose paths begin alike."""
    title = f"{count} sites" + (f" in {prefix}" if prefix else "")
    return Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
