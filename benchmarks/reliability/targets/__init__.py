"""Targets of fuzzing: functions of bytes that make an input of them and check what must hold of it.

An input gives a result or one `MixoraError`; anything else is a finding. `TARGETS` serves the tests, with a few inputs
of hypothesis, and `benchmarks.reliability.fuzz`, with many of atheris.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.reliability.targets import adapters, checkpoints, records, rows, settings


class Target(NamedTuple):
    """`inputs`: how many a full run gives it. `seeds`: inputs to begin with, for targets that read plain bytes."""

    run: Callable[[bytes], None]
    inputs: int
    seeds: Callable[[], list[bytes]] = list


TARGETS = {
    "run-file": Target(settings.read_file, 12_000, settings.seed_files),
    "settings": Target(settings.read_settings, 12_000),
    "words": Target(settings.read_words, 12_000),
    "comparison": Target(settings.compare, 6_000),
    "method": Target(settings.plan_method, 4_000),
    "jsonl": Target(rows.read_lines, 12_000, rows.seed_lines),
    "jsonl-rows": Target(rows.read_objects, 12_000),
    "json": Target(rows.read_list, 6_000, rows.seed_lists),
    "csv": Target(rows.read_table, 8_000, lambda: list(rows.ODD_TABLES)),
    "parquet": Target(rows.read_parquet, 6_000),
    "folder": Target(rows.read_folder, 4_000),
    "text": Target(rows.encode_text, 4_000),
    "template": Target(rows.render_template, 1_500, lambda: [text.encode() for text in rows.ODD_TEMPLATES]),
    "adapter-config": Target(adapters.read_config, 4_000),
    "adapter-header": Target(adapters.read_header, 4_000),
    "adapter-tensors": Target(adapters.read_tensors, 2_000),
    "adapter-bits": Target(adapters.flip_bits, 2_000),
    "crafted": Target(checkpoints.convert_crafted, 3_000),
    "moe-peft": Target(checkpoints.convert_moe_peft, 3_000),
    "gguf": Target(checkpoints.read_gguf, 1_500),
    "record": Target(records.report_run, 3_000),
    "checkpoint": Target(records.report_checkpoint, 3_000),
    "interrupted": Target(records.reopen_run, 3_000),
    "names": Target(records.open_names, 3_000),
    "command": Target(records.command, 1_500),
}
