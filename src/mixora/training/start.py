"""What a run was started with, and that it is still the same where the run goes on: rows, base, versions."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from pydantic import ValidationError
from torch import nn

from mixora.config import Strict
from mixora.errors import CheckpointError
from mixora.files.asides import writing
from mixora.training.material import Material, TrainingSet

START = "start.json"
PACKAGES = ("mixora", "torch", "transformers", "peft", "accelerate", "datasets")
SAMPLES = 1024
BATCH = 1000
# where the base lies, and what other versions of transformers write differently
_NO_PART_OF_THE_BASE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


class Start(Strict):
    """`rows`: how many were encoded, and `digest` of them all. `weights`: digest of a sample of each tensor.

    `interruptions`: how often the run went on since.
    """

    rows: int
    digest: str
    configuration: dict[str, Any]
    weights: str
    versions: dict[str, str]
    interruptions: int = 0


def describe_start(material: Material, rows: TrainingSet) -> Start:
    """Of the rows as encoded, in their order, and of the base as it was loaded."""
    configuration = {k: v for k, v in material.model.config.to_dict().items() if k not in _NO_PART_OF_THE_BASE}
    return Start(
        rows=len(rows.dataset),
        digest=digest_rows(rows.dataset),
        # as it will be read
        configuration=json.loads(json.dumps(configuration, default=str)),
        weights=digest_weights(material.model),
        versions={**{name: version(name) for name in PACKAGES}, "CPU threads": str(torch.get_num_threads())},
    )


def digest_rows(rows: datasets.Dataset) -> str:
    """A checksum of all values of all columns, whatever the versions of the libraries that hold them."""
    digest = hashlib.sha256()
    for table in rows.with_format("arrow").iter(batch_size=BATCH):
        for name in sorted(table.column_names):
            digest.update(name.encode())
            for part in _bytes_of(table[name].combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _bytes_of(column: pa.Array) -> Iterator[bytes]:
    """Of lists the lengths, then the values."""
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield pc.list_value_length(column).cast(pa.int64()).to_numpy(zero_copy_only=False).tobytes()
        yield from _bytes_of(pc.list_flatten(column))
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        yield column.to_numpy(zero_copy_only=False).tobytes()
    else:
        yield json.dumps(column.to_pylist(), default=str).encode()


def digest_weights(model: nn.Module) -> str:
    """A checksum of names, shapes, and about a thousand values of each tensor, evenly spaced: quick for any size."""
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_start(run: Path, start: Start) -> None:
    """Keep it in the folder of the run."""
    with writing(run / START) as path:
        path.write_text(start.model_dump_json(indent=1) + "\n", encoding="utf-8")


def read_start(run: Path) -> Start:
    """What a run was started with; `CheckpointError` where that is not known."""
    try:
        return Start.model_validate_json((run / START).read_bytes())
    except (OSError, ValidationError) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else "is damaged"
        raise CheckpointError(
            f"{run / START}: {reason}, so it is not known what the run was started with; valid: a new run"
        ) from None


def check_start(run: Path, now: Start) -> tuple[Start, list[str]]:
    """What to keep for a run that goes on now, and what is to be told: packages of other versions.

    Raises `CheckpointError` naming what is not as it was: rows, the base's configuration, its weights.
    """
    then = read_start(run)
    if changes := list(_changes(then, now)):
        raise CheckpointError(
            f"{run}: cannot go on, since what it was started with has changed: {'; '.join(changes)}; "
            "valid: the same rows and base, or a new run"
        )
    told = [
        f"{name} was {then.versions[name]} when the run was started and is {found} now; "
        "the run may not end in the same weights to the last bit."
        for name, found in now.versions.items()
        if name in then.versions and then.versions[name] != found
    ]
    return then.model_copy(update={"interruptions": then.interruptions + 1}), told


def _changes(then: Start, now: Start) -> Iterator[str]:
    if then.rows != now.rows:
        yield f"the training rows: {now.rows:,}, were {then.rows:,}"
    elif then.digest != now.digest:
        yield f"the training rows: as many ({now.rows:,}), but not the same"
    if names := _differing(then.configuration, now.configuration):
        yield f"the base's configuration: {', '.join(names)}"
    if then.weights != now.weights:
        yield "the base's weights"


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that both know; another version of transformers may know others."""
    return sorted(name for name in then.keys() & now.keys() if then[name] != now[name])
