"""The report of a run: one page that stands alone, and its plots."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mixora.diagnostics.charts import draw_lines
from mixora.diagnostics.page import (
    NOTHING,
    format_value,
    is_named,
    is_number,
    write_code,
    write_fold,
    write_page,
    write_section,
    write_table,
)
from mixora.diagnostics.plots import plot_expert_load, plot_loss, save_png
from mixora.diagnostics.record import BadStep, Row, RunRecord, Scores, write_record
from mixora.diagnostics.router_sections import (
    LIVE,
    write_depth,
    write_findings,
    write_groups,
    write_live,
    write_load,
    write_similar,
    write_typical,
)
from mixora.files.asides import writing

PAGE, LOSS, LOAD = "report.html", "loss.png", "expert_load.png"
BETTER_LOW = ("loss", "perplexity", "error")


def write_report(record: RunRecord, folder: str | Path) -> Path:
    """Write `report.html`, `record.json`, and `loss.png` and `expert_load.png` where there is something to draw.

    What an earlier report left in `folder` is replaced, the record last: where it stands, the report is whole. Returns
    the path of the page. Raises `UnwrittenError` where the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (LOSS, LOAD):
        (folder / name).unlink(missing_ok=True)
    if record.history:
        with writing(folder / LOSS) as path:
            save_png(plot_loss(_without_live(record.history)), path)
    if record.load and record.load["sites"]:
        with writing(folder / LOAD) as path:
            save_png(plot_expert_load(record.load), path)
    with writing(folder / PAGE) as path:
        path.write_text(render(record), encoding="utf-8")
    write_record(record, folder)
    return folder / PAGE


def render(record: RunRecord) -> str:
    """The page as text; a section that nothing is known about is left out."""
    sections = [
        _write_verdict(record),
        "".join(f"<p>{escape(note)}</p>" for note in record.notes),
        _write_tiles(record.parameters),
        write_section("Before and after", _write_scores(record)),
        write_section("Tasks", _write_tasks(record.tasks)),
        write_section("Are the routers well?", write_findings(record)),
        write_section("Training", _write_training(record.history)),
        write_section("Steps left out", _write_bad_steps(record.bad_steps)),
        write_section("Routers during training", write_live(record.history)),
        write_section("Load of the experts", write_load(record.routing)),
        write_section("Routers over depth", write_depth(record.routing)),
        write_section("Who reads what", write_groups(record.load)),
        write_section("Typical tokens", write_typical(record.typical, record.strongest)),
        write_section("Experts alike", write_similar(record.similar)),
        write_section("What the model says", "".join(map(_write_generation, record.generations))),
        write_section("Plan", _write_plan(record.plan)),
        write_section("Your own data", write_code(record.next_command) if record.next_command else ""),
        write_section("How it was made", _write_making(record)),
    ]
    subtitle = " · ".join(part for part in (record.recipe, record.base, record.data, record.created) if part)
    return write_page(record.title, subtitle, sections)


def summarise(record: RunRecord) -> str:
    """The verdict in words, computed from the scores; it says so if something got worse or is not a number."""
    names = _name_scores(record.after)
    if not names:
        return "No scores were taken."
    parts = [_compare(name, record.before.get(name), record.after[name]) for name in names]
    rows = record.after.get("rows")
    text = ", ".join(parts) + (f" on {rows:.0f} held-out rows." if rows else ".")
    text = text[0].upper() + text[1:]
    if record.reloaded is None:
        return text
    if differ := [name for name in names if not _same(record.reloaded.get(name), record.after[name])]:
        return f"{text} Read back from disk, the adapter differs in {', '.join(differ)}."
    return f"{text} Read back from disk, the adapter gives the same numbers."


def describe_loss(history: Sequence[Mapping[str, Any]]) -> str:
    """The first and last loss in words."""
    if not history:
        return ""
    ends = [history[0], history[-1]] if len(history) > 1 else [history[0]]
    words = [f"{format_value(row.get('loss'))} at step {row['step']}" for row in ends]
    return f"Training loss: {', '.join(words)}."


def got_worse(record: RunRecord) -> bool:
    """Whether any score got worse, is not finite, or changed when the adapter was read back."""
    for name in _name_scores(record.after):
        before, after = record.before.get(name), record.after[name]
        if not is_number(after) or _change(name, before, after) == "worse":
            return True
        if record.reloaded is not None and not _same(record.reloaded.get(name), after):
            return True
    return False


def _name_scores(*scores: Scores) -> list[str]:
    return [name for name in dict.fromkeys(name for group in scores for name in group) if name != "rows"]


def _compare(name: str, before: float | None, after: float | None) -> str:
    words = name.replace("_", " ")
    if not is_number(after):
        return f"{words} is not a finite number after training"
    if not is_number(before):
        return f"{words} {format_value(after, name)}"
    change = _change(name, before, after)
    numbers = f"{words} {format_value(before, name)} → {format_value(after, name)}"
    return numbers if change == "better" else f"{numbers} ({change})"


def _change(name: str, before: float | None, after: float | None) -> str:
    if not (is_number(before) and is_number(after)):
        return NOTHING
    if before == after:
        return "unchanged"
    return "better" if (after < before) == is_named(name, BETTER_LOW) else "worse"


def _same(one: float | None, other: float | None) -> bool:
    """Equal up to what another order of summation may change."""
    return is_number(one) and is_number(other) and math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)


def _write_verdict(record: RunRecord) -> str:
    mark = " bad" if got_worse(record) else ""
    return f'<p class="verdict{mark}">{escape(summarise(record))}</p>'


def _write_tiles(parameters: Mapping[str, int]) -> str:
    total = parameters.get("total")
    tiles = []
    for name, count in parameters.items():
        share = f" · {count / total:.2%}" if total and name != "total" else ""
        label = {"active": "active for one token"}.get(name, name)
        tiles.append(f'<div class="tile"><b>{count:,}</b><span class="soft">{escape(label + share)}</span></div>')
    return write_section("Parameters", f'<div class="tiles">{"".join(tiles)}</div>') if tiles else ""


def _write_scores(record: RunRecord) -> str:
    rows = []
    for name in _name_scores(record.before, record.after):
        before, after = record.before.get(name), record.after.get(name)
        row = {
            "score": name.replace("_", " "),
            "before": format_value(before, name),
            "after": format_value(after, name),
        }
        if record.reloaded is not None:
            row["read back"] = format_value(record.reloaded.get(name), name)
        rows.append(row | {"": _change(name, before, after)})
    return write_table(rows, numeric=("before", "after", "read back"))


def _write_training(history: Sequence[Mapping[str, Any]]) -> str:
    """The loss, and each auxiliary term by itself: they have scales of their own."""
    rows = [row for row in _without_live(history) if "step" in row]
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    titles = {"loss": "Training loss (nats)"}
    charts = [
        draw_lines(titles.get(name, name), {name: [(row["step"], row.get(name)) for row in rows]}, "step")
        for name in names
    ]
    words = f"<p>{escape(describe_loss(rows))}</p>"
    return f'{words}<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def _write_bad_steps(steps: Sequence[BadStep]) -> str:
    rows = [
        {"step": bad.step, "micro-batch": bad.micro_batch, "where numbers stopped being finite": bad.place}
        | {"rows of the training data": ", ".join(map(str, bad.rows)) or NOTHING}
        for bad in steps
    ]
    return write_table(rows)


def _without_live(history: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(LIVE)} for row in history]


def _write_tasks(tasks: Mapping[str, Row]) -> str:
    rows = []
    for task, found in tasks.items():
        for name, after in found["after"].items():
            before = found["before"].get(name)
            row = {"task": task, "score": name.replace("_", " "), "before": format_value(before, name)}
            rows.append({**row, "after": format_value(after, name), "": _change(name, before, after)})
    return write_table(rows, numeric=("before", "after"))


def _write_generation(said: Mapping[str, str]) -> str:
    lines = []
    for name in ("prompt", "expected", "before", "after"):
        mark = ""
        if name in ("before", "after") and said.get("expected"):
            right = said.get(name, "").strip() == said["expected"].strip()
            mark = ' <span class="good">✓ as expected</span>' if right else ' <span class="soft">✗ differs</span>'
        lines.append(f"<dt>{name}</dt><dd>{escape(said.get(name, '')) or NOTHING}{mark}</dd>")
    return f'<div class="said"><dl>{"".join(lines)}</dl></div>'


def _write_plan(plan: Sequence[Row]) -> str:
    return write_fold(_count_sites(plan), write_table(plan)) if plan else ""


def _count_sites(rows: Sequence[Row]) -> str:
    return f"{len(rows):,} site{'s' * (len(rows) != 1)}"


def _write_making(record: RunRecord) -> str:
    rows = [{"name": name, "value": format_value(value)} for name, value in record.environment.items()]
    return (write_code(record.command) if record.command else "") + write_table(rows)
