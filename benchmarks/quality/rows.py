"""Rows of a data set that a table can use: none is cut short by the table's length, and none has two right answers."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from mixora.bases import read_tokenizer
from mixora.data import EncodingConfig, encode, read_rows
from mixora.data.sources import splits_of

FOLDER = Path("build/quality")
LONGEST = 1 << 16
Row = dict[str, Any]


@cache
def select_rows(source: str, base: str, length: int) -> str:
    """A folder with the rows of the folder `source` that fit, split by split.

    A row fits with its prompt, its answer and what the chat template adds. Hub ids, and rows with a label, which no
    cut can take, are given back as they are.
    """
    folder = Path(source)
    if not folder.is_dir() or _is_labelled(folder):
        return source
    out = FOLDER / f"{folder.name}-{Path(base).name}-{length}"
    for split in splits_of(source):
        target = out / f"{split}.jsonl"
        if not target.exists():
            with (folder / f"{split}.jsonl").open(encoding="utf-8") as lines:
                _write(target, [row for row in map(json.loads, lines) if not _is_ambiguous(row)])
            _write(target, _fitting(target, base, length))
    return str(out)


def _is_labelled(folder: Path) -> bool:
    with (folder / "train.jsonl").open(encoding="utf-8") as lines:
        return "label" in json.loads(next(lines))


def _is_ambiguous(row: Row) -> bool:
    return "choices" in row and row["choices"].count(row["choices"][row["answer"]]) > 1


def _fitting(path: Path, base: str, length: int) -> list[Row]:
    rows = read_rows(path, "train")
    encoded = encode(rows, read_tokenizer(base), EncodingConfig(max_length=LONGEST), model_kind="decoder")
    assert len(encoded.dataset) == len(rows)
    return [dict(row) for row, ids in zip(rows, encoded.dataset["input_ids"], strict=True) if len(ids) <= length]


def _write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
