"""Targets of fuzzing: functions of bytes that make an input of them and check what must hold of it.

An input gives a result or one `MixoraError`; anything else is a finding. `TARGETS` serves the tests, with a few inputs
of hypothesis, and `benchmarks.reliability.fuzz`, with many of atheris.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.reliability.targets import adapters, checkpoints, records, rows, settings


def choices() -> list[bytes]:
    """Bytes at random, for targets that draw from them."""
    draw = random.Random(0)
    return [draw.randbytes(10 * (n + 1)) for n in range(25)]


class Target(NamedTuple):
    """`inputs`: how many a full run gives it. `seeds`: inputs to begin with."""

    run: Callable[[bytes], None]
    inputs: int
    seeds: Callable[[], list[bytes]] = choices


TARGETS = {
    "run-file": Target(settings.read_file, 2_000, settings.seed_files),
    "settings": Target(settings.read_settings, 1_500),
    "words": Target(settings.read_words, 2_000),
    "comparison": Target(settings.compare, 1_500),
    "method": Target(settings.plan_method, 200),
    "jsonl": Target(rows.read_lines, 30_000, rows.seed_lines),
    "jsonl-rows": Target(rows.read_objects, 30_000),
    "json": Target(rows.read_list, 15_000, rows.seed_lists),
    "csv": Target(rows.read_table, 15_000, lambda: list(rows.ODD_TABLES)),
    "parquet": Target(rows.read_parquet, 500),
    "folder": Target(rows.read_folder, 3_000),
    "text": Target(rows.encode_text, 200),
    "template": Target(rows.render_template, 60, lambda: [text.encode() for text in rows.ODD_TEMPLATES]),
    "adapter-config": Target(adapters.read_config, 150),
    "adapter-header": Target(adapters.read_header, 300),
    "adapter-tensors": Target(adapters.read_tensors, 120),
    "adapter-bits": Target(adapters.flip_bits, 120),
    "crafted": Target(checkpoints.convert_crafted, 200),
    "moe-peft": Target(checkpoints.convert_moe_peft, 120),
    "gguf": Target(checkpoints.read_gguf, 100),
    "record": Target(records.report_run, 120),
    "checkpoint": Target(records.report_checkpoint, 300),
    "interrupted": Target(records.reopen_run, 300),
    "names": Target(records.open_names, 1_000),
    "command": Target(records.command, 40),
}
