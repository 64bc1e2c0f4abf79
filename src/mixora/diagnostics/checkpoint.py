"""A record from what a trainer of transformers leaves behind: its log, and the adapter's configuration beside it."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mixora.diagnostics.page import is_number
from mixora.diagnostics.record import RECORD, RunRecord, read_record
from mixora.errors import CheckpointError
from mixora.files.documents import read_json
from mixora.planning.plan import Plan

STATE, ADAPTER = "trainer_state.json", "adapter_config.json"
NO_SCORES = ("epoch", "learning_rate", "grad_norm", "auxiliary_loss", "num_input_tokens_seen")
NOTE = "Made from a checkpoint's log. Scores, and what the routers do with held-out rows, come from `mixora train`."


def find_record(folder: Path) -> RunRecord:
    """The record of a run, or what can be told from a trainer's checkpoint; `CheckpointError` where there is neither.

    Of several checkpoints below `folder`, the last one is read.
    """
    if (folder / RECORD).is_file():
        return read_record(folder)
    steps = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    last = sorted(steps, key=lambda path: int(path.name.removeprefix("checkpoint-")))[-1:]
    for checkpoint in (folder, *last):
        if (checkpoint / STATE).is_file():
            return _read_checkpoint(checkpoint)
    raise CheckpointError(
        f"{folder}: holds neither {RECORD} nor {STATE}; valid: the folder that `mixora train` wrote, or one with a "
        "trainer's checkpoints"
    )


def history_of(log: Iterable[Mapping[str, Any]]) -> list[dict[str, int | float | None]]:
    """Of a trainer's log the steps with their task's own loss, each auxiliary term, and the routers' figures."""
    lines = [line for line in log if "loss" in line]
    return [
        {
            **{name: _number(value) for name, value in line.items() if not _is_bookkeeping(name)},
            "loss": _own_loss(line),
        }
        for line in lines
    ]


def _is_bookkeeping(name: str) -> bool:
    return name in NO_SCORES or name.startswith("train_")


def _is_step(line: Mapping[str, Any]) -> bool:
    return "step" not in line or is_number(line["step"])


def _own_loss(line: Mapping[str, Any]) -> float | None:
    loss, auxiliary = _number(line["loss"]), _number(line.get("auxiliary_loss", 0.0))
    return None if loss is None or auxiliary is None else loss - auxiliary


def _number(value: Any) -> int | float | None:
    return value if is_number(value) else None


def _read_checkpoint(folder: Path) -> RunRecord:
    state, adapter = _read_json(folder / STATE), {}
    if (folder / ADAPTER).is_file():
        adapter = _read_json(folder / ADAPTER)
    plan = Plan.from_list(adapter.get("plan") or ())
    log = state.get("log_history", [])
    if not isinstance(log, list) or not all(isinstance(line, dict) and _is_step(line) for line in log):
        raise CheckpointError(f"{folder / STATE}: log_history is damaged; valid: a list of lines with numbers of steps")
    changed = datetime.fromtimestamp((folder / STATE).stat().st_mtime, UTC)
    return RunRecord(
        title=f"Checkpoint {folder.name} of {folder.resolve().parent.name}",
        recipe=str(adapter.get("recipe") or ""),
        base=str(adapter.get("base_model_name_or_path") or ""),
        data="",
        created=changed.isoformat(timespec="seconds"),
        command="",
        next_command="",
        plan=plan.rows(full=True),
        parameters={"trainable": plan.parameters, "active": plan.active_parameters} if plan.sites else {},
        history=history_of(line for line in log if "step" in line),
        notes=[NOTE],
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        # a trainer logs losses as they are
        return read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
