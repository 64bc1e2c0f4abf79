"""Records of one file: JSONL, JSON, CSV or Parquet, each with its place, unreadable ones as a `Fault`."""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from mixora.errors import DataError
from mixora.files.documents import MOST_DIGITS, UnreadableError, decode, parse_json


@dataclass(frozen=True)
class Fault:
    """A record that could not be read, and why."""

    reason: str


Record = tuple[str, Any]
"""Where a record stands ("line 3", "row 3") and what it holds: a row, any other JSON value, or a `Fault`."""

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def read_records(path: Path) -> Iterator[Record]:
    """The records of `path` in file order.

    Raises:
        DataError: the file cannot be opened or is damaged as a whole; single bad lines come as `Fault`s.
    """
    try:
        yield from READERS[path.suffix.lower()](path)
    except OSError as error:
        raise DataError(f"{path}: not readable: {error.strerror or error}") from None


def _read_jsonl(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield f"line {number}", _parse_line(line)


def _parse_line(line: bytes) -> Any:
    try:
        return parse_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Fault(f"is not UTF-8 (byte {error.start + 1} of the line)")
    except UnreadableError as error:
        return Fault(str(error))


def _read_json(path: Path) -> Iterator[Record]:
    try:
        rows = parse_json(decode(path.read_bytes()))
    except UnreadableError as error:
        raise DataError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds one {type(rows).__name__}; valid: a list of objects, or JSONL")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_csv(path: Path) -> Iterator[Record]:
    try:
        reader = csv.DictReader(io.StringIO(decode(path.read_bytes()), newline=""), strict=True)
    except UnreadableError as error:
        raise DataError(f"{path}: {error}") from None
    try:
        names = list(reader.fieldnames or ())
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise DataError(f"{path}, line 1: has the column {twice[0]!r} twice; valid: a name for each column")
        for row in reader:
            yield f"line {reader.line_num}", _typed(row)
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.reader.line_num}: is not CSV: {error}") from None


def _typed(row: dict[Any, Any]) -> dict[str, Any] | Fault:
    """A CSV row with numbers in `label` and `answer` and JSON lists in the fields that are lists."""
    if None in row:
        return Fault("has more cells than the header has names")
    for name in ("label", "answer"):
        if isinstance(row.get(name), str) and _NUMBER.fullmatch(row[name].strip()):
            cell = row[name].strip()
            if len(cell) > MOST_DIGITS:
                return Fault(f"the cell {name!r} holds a number of more than {MOST_DIGITS} digits")
            row[name] = int(cell) if cell.lstrip("+-").isdigit() else float(cell)
    for name in ("messages", "choices", "references"):
        if row.get(name) == "":
            row[name] = None
        elif isinstance(row.get(name), str):
            row[name] = _parse_line(row[name].encode())
            if isinstance(row[name], Fault):
                return Fault(f"the cell {name!r} {row[name].reason}")
    return row


def _read_parquet(path: Path) -> Iterator[Record]:
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: is not Parquet: {error}") from None


READERS: Mapping[str, Callable[[Path], Iterator[Record]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
