"""Kills `mixora train` with SIGKILL at random moments, resumes it, and compares its end with that of an unkilled run.

    python -m benchmarks.reliability.kills
    python -m benchmarks.reliability.kills --quick

Every recipe on a tiny model, with dropout, expert dropout, drawn routes, packing, several tasks, worker processes and
gradient accumulation spread over them; fp32 on a CPU. Moments are drawn over the life of the process; a share of the
kills waits for a file or folder that is being written. Each kill is followed by the same command with --resume (or
the first command again, where the run had not begun), and that process is killed too, until the kills of the recipe
are used up. Weights, and all of the record but dates, times and the number of interruptions, have to be equal to the
last bit. Libraries are imported once; each attempt is a fork that runs the command.
"""

import argparse
import gc
import importlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.kill_cases import CASES, make_settings, write_material
from mixora.cli import app
from mixora.diagnostics.record import read_record
from mixora.files.asides import ASIDE
from mixora.training.manifest import find_damage
from mixora.training.progress import Progress

DIFFERS = ("created", "command", "environment")
AIMS = {"any moment": 0.5, "a checkpoint": 0.35, "the final files": 0.15}
PATIENCE = 120.0
PHASE = mmap.mmap(-1, 64)


def tell_phases() -> None:
    """Forks say what they are doing where their parent can read it after their death."""
    task = Progress.task

    @contextmanager
    def told(self: Progress, label: str) -> Iterator[Any]:
        PHASE[:64] = label.encode()[:64].ljust(64)
        with task(self, label) as advance:
            yield advance
        PHASE[:64] = f"after {label}".encode()[:64].ljust(64)

    Progress.task = told


def fork(work: Callable[[], None], log: Path) -> int:
    """Run `work` in a child with its output in `log`; the child's number."""
    PHASE[:64] = b"start".ljust(64)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def train(settings: Path, out: Path, log: Path) -> int:
    """Start or resume the run of `settings`, as a user would."""
    words = ["train", "--resume", str(out)] if (out / "run.yaml").is_file() else ["train", str(settings)]
    return fork(lambda: app(words), log)


def wait(child: int, moment: Callable[[], bool]) -> int | None:
    """The exit code of a child that ended by itself; None for one that was killed when `moment` came."""
    began = time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - began > PATIENCE:
            raise SystemExit(f"a run took longer than {PATIENCE} s")
        if moment():
            os.kill(child, signal.SIGKILL)
            # it may have ended in between
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            return None if code == -signal.SIGKILL else code
        time.sleep(0.0005)


def choose_moment(aim: str, out: Path, life: float, dice: random.Random) -> Callable[[], bool]:
    """When to kill: at a time within `life` seconds, or some milliseconds into something that is being written."""
    began, since, delay = time.monotonic(), time.time(), dice.uniform(0, life)
    if aim == "any moment":
        return lambda: time.monotonic() - began > delay
    aside = out / ("checkpoints" if aim == "a checkpoint" else "") / ASIDE
    delay, left, seen = dice.uniform(0, 0.03), dice.randint(1, 3), 0.0

    def moment() -> bool:
        nonlocal left, seen
        if not is_younger(aside, since):
            left, seen = left - bool(seen), 0.0
            return False
        seen = seen or time.monotonic()
        return left <= 1 and time.monotonic() - seen > delay

    return moment


def is_younger(path: Path, since: float) -> bool:
    """Whether it is there, and not left by an earlier process."""
    try:
        return path.stat().st_mtime > since
    except FileNotFoundError:
        return False


def look(out: Path, since: float) -> dict[str, Any]:
    """What a kill left: in which phase it hit, what was being written, and which checkpoints are not whole."""
    asides = [path for folder in (out / "checkpoints", out) for path in sorted((folder / ASIDE).glob("*"))]
    asides = [path for path in asides if is_younger(path, since)]
    checkpoints = sorted((out / "checkpoints").glob("checkpoint-*"))
    return {
        "phase": PHASE[:64].decode().strip(),
        "writing": re.sub(r"\d+", "N", asides[0].name) if asides else None,
        "checkpoints": [path.name for path in checkpoints],
        "half_written": [path.name for path in checkpoints if find_damage(path)],
    }


def compare(whole: Path, parts: Path) -> list[str]:
    """What differs between two finished runs."""
    weights = "adapter/adapter_model.safetensors"
    one, other = (vars(read_record(folder)) for folder in (whole, parts))
    found = [name for name in one if name not in DIFFERS and one[name] != other[name]]
    if (whole / weights).read_bytes() != (parts / weights).read_bytes():
        found.append("weights")
    if {path.name for path in whole.iterdir()} != {path.name for path in parts.iterdir()}:
        found.append("files")
    return found


def try_case(recipe: str, folder: Path, kills: int, dice: random.Random, options: argparse.Namespace) -> dict[str, Any]:
    """Kill runs of one recipe until `kills` are used up and the last run has ended."""
    log, whole = folder / "log", folder / f"{recipe}-whole"
    settings = folder / f"{recipe}.yaml"
    tree = make_settings(recipe, folder, whole, options.steps, options.save_every)
    settings.write_text(yaml.safe_dump(tree))
    began = time.monotonic()
    if wait(train(settings, whole, log), lambda: False):
        raise SystemExit(f"{recipe}: the uninterrupted run failed:\n{log.read_text()}")
    life = time.monotonic() - began
    hits: list[dict[str, Any]] = []
    ends: list[dict[str, Any]] = []
    while not ends or len(hits) < kills:
        out = folder / f"{recipe}-{len(ends)}"
        settings.write_text(yaml.safe_dump({**tree, "out": str(out)}))
        before = len(hits)
        resumes = run_to_the_end(settings, out, log, kills, life, dice, hits)
        ends.append({"kills": len(hits) - before, "resumes": resumes, **judge(whole, out)})
        print(f"{recipe}: {ends[-1]}", flush=True)
        shutil.rmtree(out)
    return {"recipe": recipe, "seconds": round(life, 2), "runs": ends, "hits": hits}


def run_to_the_end(
    settings: Path, out: Path, log: Path, kills: int, life: float, dice: random.Random, hits: list[dict[str, Any]]
) -> int:
    """Start and resume one run, killing it while kills are left; how often it was resumed."""
    resumes = 0
    while True:
        aim = dice.choices(list(AIMS), list(AIMS.values()))[0]
        is_resumed = (out / "run.yaml").is_file()
        resumes += is_resumed
        moment = choose_moment(aim, out, life, dice) if len(hits) < kills else lambda: False
        began = time.time()
        code = wait(train(settings, out, log), moment)
        if code is None:
            hits.append({"aim": aim, "was_resumed": is_resumed, **look(out, began)})
        # a kill of the last moment leaves nothing to go on with
        if code == 0 or (out / "record.json").is_file():
            return resumes
        if code is not None:
            raise SystemExit(f"{out.name}: exit code {code} after {hits[-1:]}:\n{log.read_text()}")


def judge(whole: Path, out: Path) -> dict[str, Any]:
    """The finished run against the uninterrupted one; leftovers of a kill after its end are cleaned first."""
    if wait(fork(lambda: app(["train", "--resume", str(out)]), out.parent / "refusal"), lambda: False) != 2:
        raise SystemExit(f"{out.name}: a finished run was not refused")
    return {"differences": compare(whole, out), "interruptions": read_record(out).environment["interruptions"]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    # what a run imports, before the first fork
    for name in ("mixora.training.rehearsal", "mixora.training.run", "mixora.training.summaries"):
        importlib.import_module(name)
    tell_phases()
    # collecting would copy what forks share
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if wait(fork(lambda: write_material(folder), folder / "log"), lambda: False):
            raise SystemExit((folder / "log").read_text())
        dice = random.Random(options.seed)
        cases = [try_case(recipe, folder, options.kills, dice, options) for recipe in options.recipes]
    hits = [hit for case in cases for hit in case["hits"]]
    runs = [run for case in cases for run in case["runs"]]
    return {
        "seed": options.seed,
        "steps": options.steps,
        "save_every": options.save_every,
        "kills": len(hits),
        "resumes": sum(run["resumes"] for run in runs),
        "runs": len(runs),
        "runs_that_differ": sum(bool(run["differences"]) for run in runs),
        "half_written_checkpoints": sum(len(hit["half_written"]) for hit in hits),
        "kills_by_phase": dict(Counter(hit["phase"] for hit in hits).most_common()),
        "kills_by_file": dict(Counter(hit["writing"] for hit in hits if hit["writing"]).most_common()),
        "cases": cases,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--kills", type=int, default=5, help="for each recipe")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--save-every", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two kills of one recipe")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    if options.quick:
        options.recipes, options.kills, options.steps, options.save_every = ["sira"], 2, 4, 1
    torch.set_num_threads(1)
    facts = describe_run(["python", "-m", "benchmarks.reliability.kills", *sys.argv[1:]])
    found = {**facts, **measure(options)}
    print(write_results("reliability-kills", found, options.out))
    print(json.dumps({name: value for name, value in found.items() if name != "cases"}, indent=1))
    if found["runs_that_differ"] or found["half_written_checkpoints"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
