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
    "run-file": Target(settings.read_file, 4_000, settings.seed_files),
    "settings": Target(settings.read_settings, 4_000),
    "words": Target(settings.read_words, 6_000),
    "comparison": Target(settings.compare, 4_000),
    "method": Target(settings.plan_method, 800),
    "jsonl": Target(rows.read_lines, 26_000, rows.seed_lines),
    "jsonl-rows": Target(rows.read_objects, 26_000),
    "json": Target(rows.read_list, 12_000, rows.seed_lists),
    "csv": Target(rows.read_table, 10_000, lambda: list(rows.ODD_TABLES)),
    "parquet": Target(rows.read_parquet, 1_500),
    "folder": Target(rows.read_folder, 4_000),
    "text": Target(rows.encode_text, 500),
    "template": Target(rows.render_template, 200, lambda: [text.encode() for text in rows.ODD_TEMPLATES]),
    "adapter-config": Target(adapters.read_config, 500),
    "adapter-header": Target(adapters.read_header, 1_000),
    "adapter-tensors": Target(adapters.read_tensors, 400),
    "adapter-bits": Target(adapters.flip_bits, 400),
    "crafted": Target(checkpoints.convert_crafted, 800),
    "moe-peft": Target(checkpoints.convert_moe_peft, 500),
    "gguf": Target(checkpoints.read_gguf, 300),
    "record": Target(records.report_run, 400),
    "checkpoint": Target(records.report_checkpoint, 1_000),
    "interrupted": Target(records.reopen_run, 800),
    "names": Target(records.open_names, 2_000),
    "command": Target(records.command, 150),
}
