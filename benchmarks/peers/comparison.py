"""Time and memory of a training step with other libraries as released, each in an environment of its own.

One Llama of SmolLM2-135M's shape and one batch for all; 8 experts of rank 8, 2 for a token. Environments are made on
demand from the pinned versions in `benchmarks/peers/*.txt`. Those of one environment take turns with PEFT's LoRA of
rank 16 in the same environment, and with LoRA and mixtures in ours; ratios are taken within a turn, to either LoRA.
What cannot run is listed with its reason. A step of MoE-PEFT is one without its recomputation.
"""

import argparse
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.environments import FOLDER, make_environment
from benchmarks.measuring import alternate, relate, tabulate
from benchmarks.peers.processes import PeerError, Worker
from benchmarks.running import DTYPES

Row = dict[str, Any]
OUR_LORA = "our PEFT LoRA r=16"
THEIR_LORA = "its PEFT LoRA r=16"
FORCED = "eager attention, dropout 0.05, loss not under autocast"


@dataclass(frozen=True)
class Group:
    """Models by label: theirs, in one environment, and those of ours that they are compared with."""

    theirs: dict[str, str]
    ours: dict[str, str]
    notes: dict[str, str]


MOLA, MIXLORA = {"mixora, recipe mola": "mola"}, {"mixora, recipe mixlora": "mixlora"}
GROUPS = {
    "peft": Group(
        {"PEFT X-LoRA": "xlora", "PEFT Arrow": "arrow"},
        MOLA,
        {
            "PEFT X-LoRA": "8 frozen LoRA of rank 8, all in use, the classifier trained; two passes of the base",
            "PEFT Arrow": "an inference method; its adapters made trainable for this",
        },
    ),
    "moe_peft": Group(
        {
            "MoE-PEFT MixLoRA": "moe_peft_mixlora",
            "MoE-PEFT MoLA": "moe_peft_mola",
            "MoE-PEFT LoRAMoE": "moe_peft_loramoe",
        },
        {**MOLA, **MIXLORA},
        {
            "MoE-PEFT MixLoRA": FORCED,
            "MoE-PEFT MoLA": FORCED,
            "MoE-PEFT LoRAMoE": f"{FORCED}; all experts serve a token; a plain LoRA in attention",
        },
    ),
    "mixlora": Group(
        {"mixlora": "mixlora_package"},
        MIXLORA,
        {"mixlora": "an inference package: weights drawn here, no router loss; dropout 0.05"},
    ),
}


def measure_group(name: str, dtype: str, options: argparse.Namespace) -> tuple[list[Row], list[Row]]:
    """Rows of all that run, and what cannot, with its reason."""
    facts = {"environment": name, "dtype": dtype}
    reasons: dict[str, str] = {}
    rows: list[Row] = []
    with ExitStack() as stack:
        try:
            python = make_environment(Path(__file__).with_name(f"{name}.txt"), options.environments)
            workers = start_workers(GROUPS[name], python, dtype, options, stack, reasons)
            rows = [{**row, **describe(row["variant"], name, workers)} for row in measure(workers, facts, options)]
        except (subprocess.CalledProcessError, PeerError, OSError) as error:
            reasons["all of them"] = str(error)
    for variant, reason in reasons.items():
        print(f"{name}: {variant} cannot run: {reason}", flush=True)
    return rows, [{**facts, "variant": variant, "reason": reason} for variant, reason in reasons.items()]


def start_workers(
    group: Group, python: Path, dtype: str, options: argparse.Namespace, stack: ExitStack, reasons: dict[str, str]
) -> dict[str, Worker]:
    """All of a group, one after the other; what cannot start gets its reason. Raises `PeerError` for either LoRA."""
    words = [f"--dtype={dtype}", *(f"--{key}={getattr(options, key)}" for key in ("layers", "batch", "gibibytes"))]
    ours = {OUR_LORA: "lora", **group.ours}
    workers = {}
    for label, kind in {**ours, THEIR_LORA: "lora", **group.theirs}.items():
        place = (sys.executable, os.environ.get("PYTHONPATH", "")) if label in ours else (str(python), "")
        worker = Worker(place[0], [kind, *words], options.seconds, path=place[1])
        stack.callback(worker.close)
        try:
            worker.start()
        except PeerError as reason:
            if kind == "lora":
                raise PeerError(f"{label}: {reason}") from reason
            reasons[label] = str(reason)
        else:
            workers[label] = worker
    return workers


def measure(workers: dict[str, Worker], facts: Row, options: argparse.Namespace) -> list[Row]:
    """Times in turns and one peak each, with ratios to the LoRA of the same environment and, for times, to ours."""
    times = alternate({label: partial(worker.ask, "time") for label, worker in workers.items()}, options.repeats)
    peaks = alternate({label: partial(worker.ask, "memory") for label, worker in workers.items()}, 1)
    across = relate(times, OUR_LORA, "ms", "ratio_to_our_lora")
    first_of_theirs = list(workers).index(THEIR_LORA)
    rows = []
    for yardstick, labels in ((OUR_LORA, [*workers][:first_of_theirs]), (THEIR_LORA, [*workers][first_of_theirs:])):
        within = relate({label: times[label] for label in labels}, yardstick, "ms", "ratio")
        memory = relate({label: peaks[label] for label in labels}, yardstick, "mebibytes", "memory_ratio")
        rows += tabulate({label: {**within[label], **across[label], **memory[label]} for label in labels}, **facts)
    return rows


def describe(label: str, name: str, workers: dict[str, Worker]) -> Row:
    """Versions, and what a library forces."""
    note = GROUPS[name].notes.get(label)
    return {"versions": workers[label].versions, **({"note": note} if note else {})}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=DTYPES, help="of the base's weights")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=list(GROUPS), help="these environments")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch", type=int, default=4, help="rows of 256 tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gibibytes", type=float, default=12.0, help="memory that one process may take")
    parser.add_argument("--seconds", type=float, default=300.0, help="the longest wait for a model or a step")
    parser.add_argument("--environments", type=Path, default=FOLDER, help="folder of the virtual environments")


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows, failed = [], []
    for dtype in options.dtype:
        for name in options.only:
            found, reasons = measure_group(name, dtype, options)
            rows += found
            failed += reasons
    return {"layers": options.layers, "batch": options.batch, "rows": rows, "failed": failed}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    title = f"Training step beside other libraries, {found['layers']} layers, {found['batch']} x 256 tokens"
    label = "time / PEFT LoRA r=16 of the same environment"
    return draw_ratios(found["rows"], ("environment", "dtype"), title, label)
