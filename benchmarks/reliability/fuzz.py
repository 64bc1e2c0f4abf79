"""Bad input: every target of `benchmarks.reliability.targets` with many inputs, each of which must be refused or right.

An input is a finding where it ends in anything but a result or a MixoraError, where what must hold of the result does
not, where it takes longer than --seconds, or where it needs more than --memory. Inputs come from atheris, guided by the
coverage of mixora, or from a generator that mutates without looking. Each target runs in a process of its own, which is
started again after a crash or a hang.
"""

import argparse
import importlib
import importlib.util
import json
import os
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability import fuzz_worker

QUICK = 20
MOST_FINDINGS = 20
PATIENCE = 60


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reliability.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("targets", nargs="*", help="names of targets; all unless given")
    parser.add_argument("--inputs", type=int, help="of each target; by default what the table of targets says")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} inputs of each target")
    parser.add_argument("--engine", choices=["atheris", "mutation"], help="atheris where it is installed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=20.0, help="most for one input")
    parser.add_argument("--memory", type=int, default=1024, help="MiB of address space that inputs may add")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = read_options(arguments)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    given = list(sys.argv[1:] if arguments is None else arguments)
    facts = describe_run(["python", "-m", "benchmarks.reliability.fuzz", *given])
    has_atheris = importlib.util.find_spec("atheris") is not None
    engine = options.engine or ("atheris" if has_atheris else "mutation")
    if not has_atheris:
        print("inputs by mutation alone: atheris is not installed (pip install --group fuzz)")
    found: dict[str, Any] = {**facts, "engine": engine, "limits": {}, "targets": {}}
    found |= {"seed": options.seed, "limits": {"seconds": options.seconds, "memory_mib": options.memory}}
    for name, inputs in _choose(options, engine).items():
        found["targets"][name] = tally = run_target(name, inputs, engine, options)
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(tally["outcomes"].items()))
        print(f"{name:16} {tally['inputs']:7,} in {tally['seconds']:6.1f} s: {kinds}", flush=True)
        for finding in tally["findings"]:
            print(f"  FINDING {json.dumps(finding)[:1500]}", flush=True)
        found["inputs"] = sum(tally["inputs"] for tally in found["targets"].values())
        found["findings"] = sum(len(tally["findings"]) for tally in found["targets"].values())
        # a run that is stopped leaves what it knows
        path = write_results("reliability-fuzz", found, options.out)
    print(f"{found['inputs']:,} inputs, {found['findings']} findings\n{path}")
    return found


def _choose(options: argparse.Namespace, engine: str) -> dict[str, int]:
    targets = _import_targets(engine)
    unknown = [name for name in options.targets if name not in targets]
    if unknown:
        sys.exit(f"got {unknown[0]!r}; valid: {', '.join(targets)}")
    inputs = QUICK if options.quick else options.inputs
    return {name: inputs or targets[name].inputs for name in options.targets or targets}


def _import_targets(engine: str) -> dict[str, Any]:
    if engine == "mutation":
        return importlib.import_module("benchmarks.reliability.targets").TARGETS
    import atheris

    with atheris.instrument_imports(include=["mixora"]):
        return importlib.import_module("benchmarks.reliability.targets").TARGETS


def run_target(name: str, inputs: int, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """Give a target so many inputs, in as many processes as that takes; what came of them."""
    total: dict[str, Any] = {"inputs": 0, "outcomes": Counter(), "findings": [], "slowest": 0.0, "restarts": 0}
    begun, seed = time.monotonic(), options.seed
    with tempfile.TemporaryDirectory(prefix="mixora-fuzz-") as folder:
        while total["inputs"] < inputs and len(total["findings"]) < MOST_FINDINGS:
            place = Path(folder) / str(seed)
            place.mkdir()
            asked = {"target": name, "inputs": inputs - total["inputs"], "engine": engine, "seed": seed}
            asked |= {"seconds": options.seconds, "memory": options.memory, "folder": str(place)}
            ended = _run_process(asked, place)
            tally = json.loads((place / "tally").read_text()) if (place / "tally").exists() else {}
            _add(total, tally, ended, place)
            seed += 1
    return {**total, "outcomes": dict(total["outcomes"]), "seconds": round(time.monotonic() - begun, 1)}


def _run_process(asked: dict[str, Any], place: Path) -> str | None:
    """Run a worker to its end; why it had to be ended, or failed. Forked, since the imports take longer than most."""
    with warnings.catch_warnings():
        # of threads, which a worker does not need
        warnings.simplefilter("ignore", DeprecationWarning)
        process = os.fork()
    if process == 0:
        fuzz_worker.work(asked, _import_targets(asked["engine"])[asked["target"]])
    seen, since, status = "", time.monotonic(), None
    while status is None:
        time.sleep(0.1)
        ended, code = os.waitpid(process, os.WNOHANG)
        status = code if ended else None
        now = (place / "count").read_text() if (place / "count").exists() else ""
        if now != seen:
            seen, since = now, time.monotonic()
        # the worker stops Python code by itself; what lies deeper is stopped here
        if time.monotonic() - since > 2 * asked["seconds"] + PATIENCE:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return "hang"
    return None if status == 0 else f"ended with {os.waitstatus_to_exitcode(status)}"


def _add(total: dict[str, Any], tally: dict[str, Any], ended: str | None, place: Path) -> None:
    done = int((place / "count").read_text() or 0) if (place / "count").exists() else 0
    # one more than done gives the input at which a process fell
    total["inputs"] += max(done, 1)
    total["outcomes"].update(tally.get("outcomes", {}))
    total["findings"] += tally.get("findings", [])
    total["slowest"] = max(total["slowest"], tally.get("slowest", 0.0))
    if ended:
        total["restarts"] += 1
        last = (place / "current").read_bytes() if (place / "current").exists() else b""
        total["findings"].append({"kind": ended, "input": last[:2000].hex()})


if __name__ == "__main__":
    sys.exit(1 if main()["findings"] else 0)
