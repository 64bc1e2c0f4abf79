"""Runs one benchmark: its options, its measurement on one thread, a dated JSON file and a plot beside it.

A module of the table in `benchmarks` offers `add_options(parser)`, `measure_all(options)`, which gives what goes into
the file, and `draw(found)`, which makes a figure of that.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import BENCHMARKS
from benchmarks.recording import RESULTS, describe_run, write_results

DTYPES = ["float32", "bfloat16"]


def add_dtypes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", nargs="+", default=DTYPES, choices=DTYPES, help="of the base's weights")


def read_options(name: str, module: Any, arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        f"mixora bench {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.add_options(parser)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file and the plot")
    return parser.parse_args(arguments)


def run(name: str, arguments: Sequence[str] | None = None) -> Path:
    """Measure, write `NAME-DATE.json` and `.png`; `arguments` are those of the command line unless given."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    module = importlib.import_module(f"benchmarks.{BENCHMARKS[name].module}")
    options = read_options(name, module, given)
    torch.set_num_threads(1)
    facts = describe_run(["mixora", "bench", name, *given])
    found = {**facts, **module.measure_all(options)}
    path = write_results(name, found, options.out)
    figure = module.draw(found)
    figure.supxlabel(f"{facts['date']}; {facts['machine']}; torch {facts['versions']['torch']}", fontsize=8)
    figure.savefig(path.with_suffix(".png"))
    print(f"{path}\n{path.with_suffix('.png')}")
    return path
