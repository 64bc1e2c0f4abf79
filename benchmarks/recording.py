"""What a file of results tells about how it was made, and where it is written."""

import json
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("torch", "transformers", "peft", "mixora")


def describe_run(command: Sequence[str]) -> dict[str, Any]:
    """Date, command, machine, load and versions; to be taken before measuring."""
    return {
        "date": str(date.today()),
        "command": shlex.join(command),
        "machine": describe_machine(),
        # how busy the machine was with other work
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **{library: version(library) for library in LIBRARIES}},
    }


def describe_machine() -> str:
    """Processor, what it has for bf16 products, cores and threads."""
    found = torch.cpu.get_capabilities()
    products = [name for name in ("avx512_bf16", "amx_bf16") if found.get(name)]
    numbers = f"{os.cpu_count()} core(s)", f"{torch.get_num_threads()} thread(s)"
    return ", ".join([found.get("cpu_name", platform.machine()), *products, *numbers])


def write_results(name: str, found: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write what was found, with the facts of `describe_run`, as `NAME-DATE.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{found['date']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path
