"""Records and checkpoints that `mixora report` reads, run folders, and names and words at the command line."""

import json
import os
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from benchmarks.reliability.targets.drawing import Draw
from benchmarks.reliability.targets.material import (
    RUN,
    adapter_config,
    adapter_files,
    base_folder,
    fresh,
    write_files,
)
from mixora.bases import read_base_config
from mixora.cli import app
from mixora.data import read_rows
from mixora.diagnostics.checkpoint import find_record
from mixora.diagnostics.record import RunRecord, Similar, Token, Typical
from mixora.diagnostics.report import render, summarise
from mixora.diagnostics.verdict import judge_routers
from mixora.errors import MixoraError
from mixora.files.folders import check_folder
from mixora.training.checkpoints import read_resumed
from mixora.tuner import recipe

SITE = "model.layers.0.self_attn.q_proj"
RECORD = RunRecord(
    title="A run",
    recipe="sira",
    base="base",
    data="rows",
    created="2026-01-02T03:04:05+00:00",
    command="mixora train",
    next_command="mixora train",
    plan=[{"path": SITE, "shape": "16 x 16", "experts": 2, "rank": "2", "top_k": 1, "router": "topk"}],
    parameters={"total": 100, "trainable": 10, "active": 5},
    before={"loss": 4.0, "accuracy": 0.1, "rows": 2},
    after={"loss": 1.0, "accuracy": 0.5, "rows": 2},
    reloaded={"loss": 1.0, "accuracy": 0.5},
    history=[{"step": n, "loss": 4.0 / n, "load_balance": 1.0, "routing/entropy": 0.5} for n in (1, 2, 3)],
    load={"groups": ["a", "b"], "sites": [SITE], "load": [[[0.5, 0.5], [0.9, 0.1]]]},
    routing=[
        {
            "path": SITE,
            "experts_per_token": 1.0,
            "entropy": 0.6,
            "max_entropy": 0.7,
            "dropped_share": 0.0,
            "dead_experts": [1],
            "load": [0.5, 0.5],
        }
    ],
    similar=[Similar(path=SITE, first=0, second=1, cosine=0.9, correlation=None)],
    typical=[Typical(path=SITE, expert=0, usual=0.5, tokens=[Token(text="a", count=3, share=0.9, score=2.0)])],
    strongest=[Typical(path=SITE, expert=0, usual=0.5, tokens=[Token(text="a", count=3, share=0.9, score=2.0)])],
    generations=[{"prompt": "a", "expected": "b", "before": "c", "after": "d"}],
    environment={"mixora": "0.1.0", "minutes": 1.0},
    notes=["a note"],
    tasks={"a": {"rows": 2, "share": 0.5, "drawn": 2, "held_out": 1, "before": {"loss": 2.0}, "after": {"loss": 1.0}}},
)
STATE: dict[str, Any] = {
    "global_step": 3,
    "max_steps": 3,
    "log_history": [{"step": n, "loss": 3.0 / n, "auxiliary_loss": 0.1, "epoch": 1.0} for n in (1, 2, 3)],
}


@cache
def _record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(asdict(RECORD)))
    return found


def _report(folder: Path) -> None:
    record = find_record(folder)
    render(record).encode()
    summarise(record)
    judge_routers(record)


def report_run(data: bytes) -> None:
    """A record.json with damages, as a page."""
    draw = Draw(data)
    text = json.dumps(draw.damage(_record()), default=str).encode()
    with fresh("record") as folder:
        (folder / "record.json").write_bytes(draw.alter(text) if draw.byte() % 4 == 0 else text)
        _report(folder)


def report_checkpoint(data: bytes) -> None:
    """A trainer's checkpoint with damages, as a page."""
    draw = Draw(data)
    with fresh("state") as folder:
        (folder / "trainer_state.json").write_text(json.dumps(draw.damage(STATE), default=str))
        config = draw.damage(adapter_config()) if draw.byte() % 2 else adapter_config()
        (folder / "adapter_config.json").write_text(json.dumps(config, default=str))
        _report(folder)


def open_names(data: bytes) -> None:
    """Any text as the name of a base, a source of rows, a folder to write, a recipe: each is refused or serves."""
    draw = Draw(data)
    name = data.decode("utf-8", "surrogateescape")[:300] if draw.byte() % 2 else draw.text()
    seen: list[MixoraError] = []
    for use in (read_base_config, read_rows, check_folder, recipe):
        try:
            use(name)
        except MixoraError as error:
            seen.append(error)
    if seen:
        raise seen[0]


def command(data: bytes) -> None:
    """Words at the command line: exit code 0 or 2, one message, no traceback."""
    draw = Draw(data)
    with fresh("command") as folder:
        words = _words(draw, folder)
        result = CliRunner().invoke(app, words, input="")
    told = result.output
    assert result.exit_code in (0, 2), f"exit code {result.exit_code} for {words}: {told[-500:]} {result.exception!r}"
    assert "Traceback" not in told and "fault:" not in told, told[-500:]
    if result.exit_code == 2:
        raise MixoraError(told)


def _words(draw: Draw, folder: Path) -> list[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(draw.damage(RUN) if draw.byte() % 2 else RUN))
    rows = "".join(json.dumps({"prompt": f"a{n}", "completion": "b"}) + "\n" for n in range(8))
    (folder / "rows.jsonl").write_text(rows)
    (folder / "record.json").write_text(json.dumps(draw.damage(_record()), default=str))
    base, out = os.fspath(base_folder()), os.fspath(folder / "out")
    changes = [f"{draw.pick(('adapter.rank', 'train.steps', 'data.max_length', draw.text()))}={draw.text()}"]
    run = os.fspath(folder / "run.yaml")
    return {
        0: ["plan", run, *changes, "--model", base],
        1: ["train", run, "--model", base, "--data", os.fspath(folder / "rows.jsonl"), "--out", out, "--dry-run"],
        2: ["report", os.fspath(folder)],
        3: ["craft", run, "--model", base, "--out", out, "--dry-run", *changes],
        4: ["export", os.fspath(folder), "--to", "peft-lora", "--out", out, "--dry-run", *changes],
        5: ["recipes", draw.text()],
        6: ["compare", run, "--out", out, "--dry-run", *changes],
        7: [draw.text(), draw.text(), draw.text()],
    }[draw.below(8)]


def reopen_run(data: bytes) -> None:
    """The folder of an interrupted run with a damaged run file, and changes to it."""
    draw = Draw(data)
    with fresh("run") as folder:
        text = yaml.safe_dump(draw.damage(RUN)).encode("utf-8", "surrogatepass")
        (folder / "run.yaml").write_bytes(draw.alter(text) if draw.byte() % 2 else text)
        write_files(folder, adapter_files() if draw.byte() % 4 == 0 else {})
        changes = draw.value()
        read_resumed(folder, changes if isinstance(changes, dict) else {})
