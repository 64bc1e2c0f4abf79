"""A process that builds one model in its own environment and runs a step for each line on its standard input.

    python -m benchmarks.peers.worker KIND --layers N --dtype D --batch N --gibibytes N

Each answer is one JSON line: first the versions, then `value` for each line `time` (milliseconds of the thread) or
`memory` (MiB at most), or `error`, after which the process ends.
"""

import argparse
import json
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

import torch

from benchmarks import training_step
from benchmarks.measuring import Step, peak_mebibytes, time_step

LIBRARIES = ("torch", "transformers", "peft", "mixora", "moe_peft", "mixlora")
MEASURES = {"time": time_step, "memory": peak_mebibytes}


def describe_versions() -> dict[str, str]:
    """Of Python and of the libraries that are here."""
    found = {"python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def build(options: argparse.Namespace) -> Step:
    from benchmarks.peers.models import MODELS

    limit = int(options.gibibytes * 2**30)
    # what needs more ends with an error instead of ending the machine's other work
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    torch.set_num_threads(1)
    training_step.ROWS = options.batch
    return MODELS[options.kind](options.layers, getattr(torch, options.dtype))


def serve(options: argparse.Namespace, answers: TextIO) -> None:
    def answer(**found: Any) -> None:
        answers.write(json.dumps(found) + "\n")

    try:
        step = build(options)
        # the first step does not count
        step()
        answer(versions=describe_versions())
        for line in sys.stdin:
            answer(value=MEASURES[line.strip()](step))
    except Exception as error:
        answer(error=f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind")
    parser.add_argument("--layers", type=int, required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--gibibytes", type=float, required=True)
    options = parser.parse_args()
    # what libraries print is not an answer
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        serve(options, answers)


if __name__ == "__main__":
    main()
