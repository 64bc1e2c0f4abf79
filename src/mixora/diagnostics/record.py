"""What a report tells, as plain values, and the file that keeps it."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Required

from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from mixora.errors import CheckpointError
from mixora.files.asides import writing

RECORD = "record.json"
Row = dict[str, Any]
Scores = dict[str, float | None]
_STRICT = ConfigDict(extra="forbid", strict=True)


class SiteRouting(TypedDict, total=False):
    """What the router of one site did with the held-out rows; see `mixora.inspect`."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    path: Required[str]
    experts_per_token: float | None
    entropy: float | None
    """In nats; None for routers without probabilities."""
    max_entropy: float | None
    """The entropy of even probabilities, in nats."""
    dropped_share: float | None
    dead_experts: list[int]
    load: list[float | None]
    """Share of the choices that fell on each expert."""


class GroupLoad(TypedDict):
    """The load of the experts by groups of rows (domains, tasks, languages)."""

    __pydantic_config__ = _STRICT  # type: ignore[misc]

    groups: list[str]
    sites: list[str]
    load: list[list[list[float | None]]]
    """Shares `[site][group][expert]` that add up to 1 over the experts."""


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token that is typical of an expert: `count` times it was seen, a `share` of these went to the expert."""

    __pydantic_config__ = _STRICT

    text: str
    count: int
    share: float
    score: float
    """Signed root of the likelihood ratio of reaching the expert so often by chance; see `typical`."""


@dataclass(frozen=True, kw_only=True)
class Typical:
    """The typical tokens of one expert of a site; of all tokens, the share `usual` goes to that expert."""

    __pydantic_config__ = _STRICT

    path: str
    expert: int
    usual: float
    tokens: list[Token]


@dataclass(frozen=True, kw_only=True)
class Similar:
    """Two experts of a site: the `cosine` of their weights, the `correlation` of their weights over the tokens."""

    __pydantic_config__ = _STRICT

    path: str
    first: int
    second: int
    cosine: float | None
    correlation: float | None


def _with_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    steps = [row["step"] for row in rows if "step" in row]
    if not all(step is not None and 0 <= step < 2**63 for step in steps):
        raise ValueError("got a step that is none; valid: a number from 0")
    return rows


def _with_scores(tasks: dict[str, Row]) -> dict[str, Row]:
    if not all(isinstance(task.get(when), dict) for task in tasks.values() for when in ("before", "after")):
        raise ValueError("got a task without scores; valid: before and after of each")
    return tasks


def _with_all_shares(load: GroupLoad | None) -> GroupLoad | None:
    if load is not None:
        sizes = [len(load["sites"]), *[len(load["groups"])] * len(load["load"])]
        if sizes != [len(load["load"]), *map(len, load["load"])]:
            raise ValueError("got a table of another size than sites and groups have; valid: [site][group][expert]")
        if any(len({len(shares) for shares in groups}) > 1 for groups in load["load"]):
            raise ValueError("got groups with unequal numbers of experts; valid: one number at a site")
    return load


@dataclass(frozen=True, kw_only=True)
class BadStep:
    """A step of the optimiser that was left out, since its loss or gradients were not finite: where this began.

    `micro_batch`: the how manieth of the step. `rows`: places in the training data, as far as they could be told.
    """

    __pydantic_config__ = _STRICT

    step: int
    place: str
    micro_batch: int
    rows: list[int]


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """All a report tells, as plain values that survive JSON; a number that is not finite becomes None on disk."""

    __pydantic_config__ = _STRICT

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
    history: Annotated[list[dict[str, int | float | None]], AfterValidator(_with_steps)] = field(default_factory=list)
    """Rows with `step`, `loss` (nats), auxiliary terms by name, and figures of the routers as `routing/...`."""
    load: Annotated[GroupLoad | None, AfterValidator(_with_all_shares)] = None
    routing: list[SiteRouting] = field(default_factory=list)
    """One row per routed site."""
    similar: list[Similar] = field(default_factory=list)
    """Per site the two most similar pairs of experts, by weights and by routing, and all twins."""
    typical: list[Typical] = field(default_factory=list)
    """Typical tokens of each expert at a few sites."""
    strongest: list[Typical] = field(default_factory=list)
    """Over all sites, the experts with the most typical token, each with this token alone."""
    generations: list[dict[str, str]] = field(default_factory=list)
    """prompt, expected, before, after."""
    environment: Row = field(default_factory=dict)
    """Versions, device, times, ..., by name."""
    notes: list[str] = field(default_factory=list)
    """Sentences that the reader should know, such as what was left out."""
    tasks: Annotated[dict[str, Row], AfterValidator(_with_scores)] = field(default_factory=dict)
    """Of each of several tasks: rows, share, drawn, held_out, and its scores `before`, `after` and `reloaded`. The
    scores of the run are their means then."""
    bad_steps: list[BadStep] = field(default_factory=list)
    """Steps that were left out; see `train.skip_bad_steps`."""
    labels: list[str] | None = None
    """The class names, one for each output of the head; none where it gives a number. None without a head; the
    records of older runs do not say."""


def write_record(record: RunRecord, folder: Path) -> Path:
    """Write `record.json` into `folder`, and return its path. Raises `UnwrittenError` where the disk is full."""
    text = json.dumps(_drop_non_finite(asdict(record)), indent=2, ensure_ascii=False, allow_nan=False)
    with writing(folder / RECORD) as path:
        path.write_text(text + "\n", encoding="utf-8")
    return folder / RECORD


def read_record(folder: str | Path) -> RunRecord:
    """The record that `write_record` left in `folder`; `CheckpointError` says what is missing or damaged."""
    path = Path(folder) / RECORD
    try:
        return TypeAdapter(RunRecord).validate_json(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{path}: no such file; valid: a folder that holds a report") from None
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors(include_url=False)]
        raise CheckpointError(f"{path}: not a run record: {'; '.join(faults[:5])}") from None


def _drop_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_non_finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_drop_non_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
