"""The report of a run: one page that stands alone, its plots, and the record they came from."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any, TypeGuard

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mixora.diagnostics.page import (
    NOTHING,
    format_value,
    is_named,
    write_code,
    write_figure,
    write_fold,
    write_page,
    write_section,
    write_table,
)
from mixora.diagnostics.plots import plot_expert_load, plot_loss, save_png
from mixora.errors import CheckpointError

PAGE, RECORD, LOSS, LOAD = "report.html", "record.json", "loss.png", "expert_load.png"
LOAD_CAPTION = "Share of each domain's tokens that each expert gets, at the first, middle and last site of one kind."
BETTER_LOW = ("loss", "perplexity", "error")
Row = dict[str, Any]
Scores = dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All a report tells, as plain values that survive JSON; a number that is not finite becomes None on disk."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    title: str
    recipe: str
    """Name of the recipe."""
    base: str
    """Name of the base model."""
    data: str
    """Name of the data set."""
    created: str
    """ISO 8601 date and time."""
    command: str
    """What was run."""
    next_command: str
    """What to run on data of one's own."""
    plan: list[Row] = field(default_factory=list)
    """One row per site: path, shape [in, out], experts, rank, top_k, router, parameters, active_parameters."""
    parameters: dict[str, int] = field(default_factory=dict)
    """`total`, `trainable`, and `active`: those among the trainable that one token uses."""
    before: Scores = field(default_factory=dict)
    """Score by name before training. `rows` is no score: it is the number of held-out rows that were scored. Names
    with `loss`, `perplexity` or `error` in them are better when lower; `accuracy`, `match` and `share` show in %."""
    after: Scores = field(default_factory=dict)
    """The same after training."""
    reloaded: Scores | None = None
    """The same for the adapter read back from disk, if that was tried."""
    history: list[Row] = field(default_factory=list)
    """Rows with `step`, `loss` (nats) and auxiliary terms by name."""
    load: Row | None = None
    """`groups` (domains), `sites` (paths), `load` (shares `[site][group][expert]` that add up to 1 over experts)."""
    routing: list[Row] = field(default_factory=list)
    """One row per site: path, experts_per_token, entropy (nats), dropped_share, dead_experts (list), load (shares)."""
    generations: list[dict[str, str]] = field(default_factory=list)
    """prompt, expected, before, after."""
    environment: Row = field(default_factory=dict)
    """Versions, device, times, ..., by name."""
    notes: list[str] = field(default_factory=list)
    """Sentences that the reader should know, such as what was left out."""
    tasks: dict[str, Row] = field(default_factory=dict)
    """Of each of several tasks: rows, share, drawn, held_out, and its scores `before`, `after` and `reloaded`. The
    scores of the run are their means then."""


def write_report(record: RunRecord, folder: str | Path) -> Path:
    """Write `report.html`, `record.json`, and `loss.png` and `expert_load.png` where there is something to draw.

    What an earlier report left in `folder` is replaced. Returns the path of the page. Raises `OSError` as files do.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_drop_non_finite(asdict(record)), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")
    for name in (LOSS, LOAD):
        (folder / name).unlink(missing_ok=True)
    drawn = {}
    if record.history:
        drawn[LOSS] = save_png(plot_loss(record.history), folder / LOSS).read_bytes()
    if record.load and record.load["sites"]:
        drawn[LOAD] = save_png(plot_expert_load(record.load), folder / LOAD).read_bytes()
    (folder / PAGE).write_text(render(record, drawn), encoding="utf-8")
    return folder / PAGE


def read_record(folder: str | Path) -> RunRecord:
    """The record that `write_report` left in `folder`; `CheckpointError` says what is missing or damaged."""
    path = Path(folder) / RECORD
    try:
        return TypeAdapter(RunRecord).validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; valid: a folder that holds a report") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors(include_url=False)]
        raise CheckpointError(f"{path}: not a run record: {'; '.join(faults[:5])}") from None


def render(record: RunRecord, drawn: Mapping[str, bytes]) -> str:
    """The page as text; `drawn` holds the PNGs by file name, and a plot that is missing is left out."""
    sections = [
        _write_verdict(record),
        "".join(f"<p>{escape(note)}</p>" for note in record.notes),
        _write_tiles(record.parameters),
        write_section("Before and after", _write_scores(record)),
        write_section("Tasks", _write_tasks(record.tasks)),
        write_section("Training", write_figure(drawn.get(LOSS), describe_loss(record.history))),
        write_section("Who reads what", write_figure(drawn.get(LOAD), LOAD_CAPTION)),
        write_section("What the model says", "".join(map(_write_generation, record.generations))),
        write_section("Routing", _write_routing(record.routing)),
        write_section("Plan", _write_plan(record.plan)),
        write_section("Your own data", write_code(record.next_command)),
        write_section("How it was made", write_code(record.command) + _write_environment(record)),
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
        if not _is_number(after) or _change(name, before, after) == "worse":
            return True
        if record.reloaded is not None and not _same(record.reloaded.get(name), after):
            return True
    return False


def _name_scores(*scores: Scores) -> list[str]:
    return [name for name in dict.fromkeys(name for group in scores for name in group) if name != "rows"]


def _compare(name: str, before: float | None, after: float | None) -> str:
    words = name.replace("_", " ")
    if not _is_number(after):
        return f"{words} is not a finite number after training"
    if not _is_number(before):
        return f"{words} {format_value(after, name)}"
    change = _change(name, before, after)
    numbers = f"{words} {format_value(before, name)} → {format_value(after, name)}"
    return numbers if change == "better" else f"{numbers} ({change})"


def _change(name: str, before: float | None, after: float | None) -> str:
    if not (_is_number(before) and _is_number(after)):
        return NOTHING
    if before == after:
        return "unchanged"
    return "better" if (after < before) == is_named(name, BETTER_LOW) else "worse"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and math.isfinite(value)


def _same(one: float | None, other: float | None) -> bool:
    """Equal up to what another order of summation may change."""
    return _is_number(one) and _is_number(other) and math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-6)


def _drop_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_non_finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_drop_non_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def _write_routing(routing: Sequence[Row]) -> str:
    if not routing:
        return ""
    dead = [row for row in routing if row.get("dead_experts")]
    words = f"{len(dead)} of {_count_sites(routing)} with" if dead else f"{_count_sites(routing)}, none with"
    rows = [{**row, "dead_experts": _name_dead(row.get("dead_experts") or [])} for row in routing]
    table = "<p>Entropy in nats; the logarithm of the number of experts means an even load.</p>"
    table += write_table(rows, bars="load")
    return f"<p>{words} an expert that no token reaches.</p>" + write_fold("All sites", table)


def _write_plan(plan: Sequence[Row]) -> str:
    return write_fold(_count_sites(plan), write_table(plan)) if plan else ""


def _count_sites(rows: Sequence[Row]) -> str:
    return f"{len(rows):,} site{'s' * (len(rows) != 1)}"


def _name_dead(experts: Sequence[int]) -> str:
    if not experts:
        return "none"
    names = " and ".join(filter(None, [", ".join(map(str, experts[:-1])), str(experts[-1])]))
    return f"{names} {'get' if len(experts) > 1 else 'gets'} no tokens"


def _write_environment(record: RunRecord) -> str:
    return write_table([{"name": name, "value": format_value(value)} for name, value in record.environment.items()])
