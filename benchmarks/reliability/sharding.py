"""Every recipe under FSDP2, ZeRO-2 and ZeRO-3 with several gloo processes, against one process with the same batch.

For each: the world's size and the share of the parameters that a process holds (an error unless they are as asked),
the largest difference of losses and trained weights after a few steps of AdamW, whether the adapter that all processes
saved loads in one process bit for bit, and whether an adapter of one process does so under sharding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import mixora
from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.sharding_ways import trained
from benchmarks.reliability.sharding_worker import are_equal, make_base, make_reference

ROOT = Path(__file__).parents[2]
QUICK = ["sira", "pesc", "adamix"]


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.reliability.sharding", description=__doc__)
    parser.add_argument("--quick", action="store_true", help=f"two processes and the recipes {', '.join(QUICK)}")
    parser.add_argument("--recipes", nargs="+", help="all unless given")
    parser.add_argument("--ways", nargs="+", default=["fsdp2", "zero2", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--balance", action="store_true", help="keep the recipes' balance losses")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.processes = [2]
    options.recipes = options.recipes or (QUICK if options.quick else mixora.recipe_names())
    if find_spec("deepspeed") is None:
        options.ways = [way for way in options.ways if not way.startswith("zero")]
    return options


def launch(folder: Path, processes: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """What the first of so many processes wrote down, one record for each recipe and way."""
    job = folder / f"job-{processes}.json"
    chosen = {"recipes": options.recipes, "ways": options.ways, "balance": options.balance}
    job.write_text(json.dumps({"processes": processes, **chosen}))
    worker = ROOT / "benchmarks" / "reliability" / "sharding_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    # DeepSpeed writes to both streams
    with (folder / "log.txt").open("w") as log:
        done = subprocess.run([*command, str(worker), str(job)], env={**os.environ, **own}, stdout=log, stderr=log)
    if done.returncode:
        sys.exit((folder / "log.txt").read_text()[-4000:])
    found: list[dict[str, Any]] = json.loads(job.with_suffix(".found.json").read_text())
    return found


def is_saved_whole(folder: Path) -> bool:
    """Whether the adapter in `folder`, loaded in this process, is what was gathered beside it."""
    model = mixora.from_pretrained(make_base(), folder, is_trainable=True)
    return are_equal(dict(trained(model)), load_file(folder / "gathered.safetensors"))


def run(arguments: list[str] | None = None) -> Path:
    options = read_options(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    facts, rows = describe_run(["python", "-m", "benchmarks.reliability.sharding", *given]), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for recipe in options.recipes:
            make_reference(recipe, options.balance, folder / recipe)
        for processes in options.processes:
            for row in launch(folder, processes, options):
                saved = is_saved_whole(folder / f"{row['recipe']}-{row['way']}-{processes}")
                rows.append({**row, "saved": saved})
                print(rows[-1], flush=True)
    counts = "-and-".join(map(str, options.processes))
    name = f"reliability-sharding-{counts}-processes{'-balance' * options.balance}"
    path = write_results(name, {**facts, "balance": options.balance, "rows": rows}, options.out)
    print(path)
    return path


if __name__ == "__main__":
    run()
