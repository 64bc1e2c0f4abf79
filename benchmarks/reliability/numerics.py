"""Numbers that go wrong, and numbers that are the same twice.

Puts numbers out of order at each place x recipe x way to train: is the place named rightly, are the weights unchanged?
Makes whole runs of each recipe, every one in a process of its own, in deterministic mode twice, without it twice, and
with two threads: are weights, losses and records equal?
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

import torch
from rich.console import Console
from safetensors.torch import load_file

import mixora
from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability import number_cases as cases
from mixora.training.progress import Progress
from mixora.training.run import fit
from mixora.training.run_config import read_run

TRAINERS = ("mixora.Trainer", "mixora.SFTTrainer", "mixora train")
OF_COMMAND = ("loss, by one bad row", "router, NaN", "expert, NaN", "frozen weight, Inf")
OF_OTHERS = ("sira", "adamix-lora", "mixlora", "pesc")
"""`mixora.Trainer` gets all; `mixora.SFTTrainer` and `mixora train`, which stand on the same code, these recipes."""
MODES = {"deterministic": (True, 1), "plain": (False, 1), "two threads": (False, 2)}
PAIRS = {
    "deterministic": ("deterministic", "deterministic again"),
    "not deterministic": ("plain", "plain again"),
    "deterministic or not": ("deterministic", "plain"),
    "one thread or two": ("plain", "two threads"),
}
OF_THE_MOMENT = ("created", "command", "environment")


def poison_all(recipes: Sequence[str], material: Path, folder: Path) -> list[dict[str, Any]]:
    """A row for each place, recipe and way to train."""
    rows = []
    for recipe in recipes:
        names = [case for case in cases.CASES if cases.has_router(recipe) or not case.startswith("router")]
        for trainer in TRAINERS if recipe in OF_OTHERS else TRAINERS[:1]:
            for case in [name for name in names if trainer != "mixora train" or name in OF_COMMAND]:
                out = folder / f"{recipe}-{trainer}-{len(rows)}"
                if trainer == "mixora train":
                    found = cases.run_command(recipe, case, material, out)
                else:
                    found = cases.run_trainer(getattr(mixora, trainer[7:]), recipe, case, out)
                rows.append({"recipe": recipe, "trainer": trainer, **cases.judge(case, *found)})
                if not (rows[-1]["is_named"] and rows[-1]["is_unchanged"]):
                    print(json.dumps(rows[-1]))
    return rows


def run_all(recipes: Sequence[str], material: Path, folder: Path, deterministic: bool) -> None:
    """A whole run of each recipe; what a process of its own does."""
    for recipe in recipes:
        tree = cases.settings_of(material, recipe, folder / recipe, deterministic=deterministic)
        fit(read_run(tree), Progress(Console(quiet=True)))


def start(recipes: Sequence[str], material: Path, folder: Path, mode: str) -> None:
    """`run_all` in another process."""
    deterministic, threads = MODES[mode.removesuffix(" again")]
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.numerics", "--worker", str(folder)]
    words += ["--material", str(material), *(["--deterministic"] if deterministic else [])]
    settings = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([*words, "--recipes", *recipes], env=settings, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def compare(recipe: str, one: Path, other: Path) -> dict[str, Any]:
    """Whether two runs of a recipe are equal, and how far apart their weights are."""
    weights = [load_file(folder / recipe / "adapter" / "adapter_model.safetensors") for folder in (one, other)]
    records = [json.loads((folder / recipe / "record.json").read_text()) for folder in (one, other)]
    losses = [[line["loss"] for line in record["history"]] for record in records]
    for record in records:
        for name in OF_THE_MOMENT:
            del record[name]
    pairs = [(weights[0][name], weights[1][name]) for name in weights[0]]
    return {
        "weights": all(torch.equal(*pair) for pair in pairs),
        "losses": losses[0] == losses[1],
        "record": records[0] == records[1],
        "largest_difference": max(float((a - b).abs().max()) for a, b in pairs),
    }


def repeat_all(recipes: Sequence[str], material: Path, folder: Path, pairs: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each recipe and pair of modes."""
    for mode in dict.fromkeys(mode for pair in pairs for mode in PAIRS[pair]):
        start(recipes, material, folder / mode, mode)
    return [
        {"recipe": recipe, "pair": pair, **compare(recipe, *(folder / mode for mode in PAIRS[pair]))}
        for pair in pairs
        for recipe in recipes
    ]


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reliability.numerics",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--recipes", nargs="+", default=list(mixora.recipe_names()), choices=mixora.recipe_names())
    parser.add_argument("--quick", action="store_true", help="one recipe, and deterministic runs only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    for name in ("--worker", "--material"):
        parser.add_argument(name, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> Path | None:
    options = read_options(arguments)
    if options.worker:
        run_all(options.recipes, options.material, options.worker, options.deterministic)
        return None
    recipes = ["sira"] if options.quick else options.recipes
    given = sys.argv[1:] if arguments is None else arguments
    torch.set_num_threads(1)
    facts = describe_run(["python", "-m", "benchmarks.reliability.numerics", *given])
    with tempfile.TemporaryDirectory() as folder:
        material = Path(folder) / "material"
        material.mkdir()
        cases.write_material(material)
        poisoned = poison_all(recipes, material, Path(folder) / "poisoned")
        pairs = ["deterministic"] if options.quick else list(PAIRS)
        repeated = repeat_all(recipes, material, Path(folder), pairs)
    found = {**facts, "seed": 0, "poisoned": poisoned, "repeated": repeated}
    path = write_results("reliability-numerics", found, options.out)
    summarise(poisoned, repeated)
    print(path)
    return path


def summarise(poisoned: Sequence[dict[str, Any]], repeated: Sequence[dict[str, Any]]) -> None:
    for case in cases.CASES:
        of_case = [row for row in poisoned if row["case"] == case]
        counts = [sum(row[name] for row in of_case) for name in ("is_named", "is_unchanged")]
        print(f"{case:<26} {len(of_case)} trainings: named {counts[0]}, weights unchanged {counts[1]}")
    for pair in dict.fromkeys(row["pair"] for row in repeated):
        rows = [row for row in repeated if row["pair"] == pair]
        counts = [sum(row[name] for row in rows) for name in ("weights", "losses", "record")]
        far = max(row["largest_difference"] for row in rows)
        print(f"{pair:<26} {len(rows)} recipes: weights, losses, record equal in {counts}; at most {far:.1e} apart")


if __name__ == "__main__":
    main()
