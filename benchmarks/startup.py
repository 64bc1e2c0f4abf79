"""CPU time of fresh processes: `mixora --help`, and `import mixora` beside `import peft`.

    python -m benchmarks.startup [--repeats N] [--name NAME]

Each process has one thread. Its time is that of user and system together, so that others disturb little.
What is imported depends on what is installed: PEFT imports bitsandbytes and torchao where they are.
"""

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks.measuring import alternate, relate, tabulate
from benchmarks.recording import RESULTS, describe_run, write_results

PROGRAMS = {
    "import peft": ["import peft"],
    "import mixora": ["import mixora"],
    "mixora --help": ["from mixora_command import main; main()", "--help"],
    "python": ["pass"],
}


def cpu_seconds(words: Sequence[str]) -> float:
    """User and system time of a fresh interpreter that runs `words`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        [sys.executable, "-c", *words], check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(words: Sequence[str], folder: Path = RESULTS) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--name", default="startup")
    options = parser.parse_args(words)
    facts = describe_run(["python", "-m", "benchmarks.startup", *words])
    measures = {name: partial(cpu_seconds, program) for name, program in PROGRAMS.items()}
    alternate(measures, 1)  # does not count: it writes bytecode and warms the file cache
    found = relate(alternate(measures, options.repeats), "import peft", "cpu_seconds", "ratio")
    return write_results(options.name, {**facts, "repeats": options.repeats, "rows": tabulate(found)}, folder)


if __name__ == "__main__":
    print(main(sys.argv[1:]))
