"""Several processes train as one does: every recipe with 1, 2 and 4 gloo processes on the same global batches.

Gives the differences of losses and weights to one process, and tokens per second. Writes
`reliability-processes-DATE.json`.

    python -m benchmarks.reliability.processes            about 20 minutes on two cores
    python -m benchmarks.reliability.processes --quick    1 and 2 processes, the recipes alone
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.data_parallel import GLOBAL_BATCH, STEPS, list_cases

ROOT = Path(__file__).parents[2]
TIMED = ("lora", "sira", "pesc")


def run_world(world: int, folder: Path, cases: Sequence[str], timed: Sequence[str]) -> dict[str, Any]:
    """What `world` processes found, with the weights of each case."""
    folder.mkdir(parents=True)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"] if world > 1 else []
    command = [sys.executable, "-W", "ignore", *torchrun, "-m", "benchmarks.reliability.data_parallel", str(folder)]
    words = ["--world", str(world), "--timed", *timed, "--cases", *cases]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{world} processes ended with {done.returncode}:\n{done.stderr[-3000:]}")
    found = json.loads((folder / "found.json").read_text())
    assert found["world"] == world
    found["weights"] = load_file(folder / "weights.safetensors")
    return dict(found)


def compare(name: str, alone: dict[str, Any], together: dict[str, Any]) -> dict[str, Any]:
    """The largest differences of a case to one process."""
    expected, found = alone["cases"][name], together["cases"][name]
    paths = [path for path in alone["weights"] if path.startswith(f"{name}/")]
    assert paths == [path for path in together["weights"] if path.startswith(f"{name}/")]
    losses = zip(expected["losses"], found["losses"], strict=True)
    return {
        "case": name,
        "processes": together["world"],
        "loss": max(abs(a - b) / abs(a) for a, b in losses),
        "weights": max(float((alone["weights"][p] - together["weights"][p]).abs().max()) for p in paths),
        "moved": expected["moved"],
        "without_tokens": found["idle"],
    }


def measure_all(worlds: Sequence[int], quick: bool) -> dict[str, Any]:
    cases, timed = list(list_cases(quick)), () if quick else TIMED
    with tempfile.TemporaryDirectory() as folder:
        found = {world: run_world(world, Path(folder) / str(world), cases, timed) for world in (1, *worlds)}
    rows = [compare(name, found[1], found[world]) for name in cases for world in worlds]
    speed = {world: of_world["tokens_per_second"] for world, of_world in found.items()}
    return {"seed": 0, "steps": STEPS, "global_batch": GLOBAL_BATCH, "rows": rows, "tokens_per_second": speed}


def print_table(found: dict[str, Any]) -> None:
    print(f"{'case':56} processes  loss     weights  moved    an expert without tokens")
    for row in found["rows"]:
        facts = f"{row['loss']:.1e}  {row['weights']:.1e}  {row['moved']:.1e}  {row['without_tokens']}"
        print(f"{row['case']:56} {row['processes']:9}  {facts}")
    for world, speed in found["tokens_per_second"].items():
        print(world, "processes, tokens per second:", {name: round(value) for name, value in speed.items()})


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two processes, the recipes under mixora.Trainer")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else list(arguments)
    facts = describe_run(["python", "-m", "benchmarks.reliability.processes", *given])
    found = {**facts, **measure_all((2,) if options.quick else (2, 4), options.quick)}
    print_table(found)
    path = write_results("reliability-processes", found, options.out)
    print(path)
    return path


if __name__ == "__main__":
    main()
