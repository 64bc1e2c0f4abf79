"""Rows from a file, a folder of splits, or the hub; every bad row is reported, none is dropped."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

import datasets

from mixora.config import did_you_mean
from mixora.data.files import READERS, Fault, Record, read_records
from mixora.data.formats import FORMS, Row, detect_form, fitting_forms, form_named, problem_of
from mixora.data.labels import check_class_names, name_classes, number_label
from mixora.errors import DataError
from mixora.files.documents import UnreadableError, find_path, read_json, show

USUAL_SPLITS = ("train", "validation", "test")
SHOWN = 10


@dataclass(frozen=True)
class Rows(Sequence[Row]):
    """Checked rows of one form.

    `labels` are the class names: a row's "label" is an index into them. `None` means that the rows are not labelled,
    or that "label" is a float to regress on. Fields that the form does not know stay in the rows as metadata.
    """

    rows: tuple[Row, ...] = field(repr=False)
    form: str
    labels: tuple[str, ...] | None
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Row, ...]: ...
    def __getitem__(self, index: int | slice) -> Row | tuple[Row, ...]:
        return self.rows[index]


@dataclass(frozen=True)
class _Split:
    """One split found: its name for messages, its class names if declared, and a way to read it from the start."""

    origin: str
    classes: tuple[str, ...] | None
    records: Callable[[], Iterable[Record]]


def read_rows(
    source: str | Path,
    split: str = "train",
    *,
    form: str | None = None,
    limit: int | None = None,
    labels: Sequence[str] | None = None,
) -> Rows:
    """Read and check the rows of one split.

    Args:
        source: a .jsonl, .json, .csv or .parquet file (its only split is "train"), a folder with one such file per
            split and perhaps a meta.json with "labels", or a hub id, "owner/name" or "owner/name:config".
        split: which split.
        form: a key of `FORMS`; told from the fields when not given.
        limit: take the first `limit` rows only; later ones are not looked at.
        labels: class names in the model's order, or none of them (an empty sequence) for numbers to regress on. If not
            given they come from meta.json, from the hub's features, or from the labels of the train split, so that all
            splits number their classes alike.

    Raises:
        DataError: nothing to read, an unknown form, or bad rows: all of them counted, the first ten named.
    """
    if form is not None:
        form_named(form)
    here = _find_split(source, split)
    records = _first_records(here, limit)
    chosen = form or _form_of(records, here.origin)
    problems = [_problem(row, chosen, told=form is not None) for _, row in records]
    rows: list[Any] = [row for _, row in records]
    classes = None
    if FORMS[chosen].labelled:
        whole = rows if limit is None and split == "train" else None
        classes = here.classes or _classes_of(source, split, chosen, whole) if labels is None else tuple(labels) or None
        rows, problems = _with_numbers(rows, problems, classes)
    _report(here.origin, records, problems)
    return Rows(tuple(rows), chosen, classes, here.origin)


def _first_records(split: _Split, limit: int | None) -> list[Record]:
    if limit is not None and limit < 1:
        raise DataError(f"limit: got {limit}; valid: 1 or more, or none")
    records = list(islice(split.records(), limit))
    if not records:
        raise DataError(f"{split.origin}: has no rows")
    return records


def _form_of(records: list[Record], origin: str) -> str:
    if not any(isinstance(row, dict) for _, row in records):
        _report(origin, records, [_problem(row, "text", told=True) for _, row in records])
    return detect_form((row for _, row in records), origin)


def _problem(row: Any, form: str, told: bool) -> str | None:
    if isinstance(row, Fault):
        return row.reason
    problem = problem_of(row, form)
    if problem or told or fitting_forms(row) == (form,):
        return problem
    other = " and ".join(fitting_forms(row))
    return f"has the fields of {other} among {form!r} rows; name one with 'form'"


def _with_numbers(
    rows: list[Any], problems: list[str | None], classes: tuple[str, ...] | None
) -> tuple[list[Any], list[str | None]]:
    for place, row in enumerate(rows):
        if problems[place] is None:
            label, problems[place] = number_label(row["label"], classes)
            rows[place] = {**row, "label": label}
    return rows, problems


def _report(origin: str, records: list[Record], problems: list[str | None]) -> None:
    bad = [f"  {where}: {problem}" for (where, _), problem in zip(records, problems, strict=True) if problem]
    if bad:
        more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        count = f"{len(bad)} bad row{'s' if len(bad) > 1 else ''} of {len(records)}"
        raise DataError("\n".join([f"{origin}: {count}", *bad[:SHOWN], *more]))


def _classes_of(source: str | Path, split: str, form: str, rows: list[Any] | None) -> tuple[str, ...] | None:
    """Class names from the labels of the train split; of `split` itself where there is no train split."""
    reference = _find_split(source, "train" if "train" in splits_of(source) else split)
    if rows is None:
        rows = [row for _, row in reference.records()]
    return name_classes((row["label"] for row in rows if problem_of(row, form) is None), reference.origin)


def splits_of(source: str | Path) -> tuple[str, ...]:
    """Names of the splits of `source`: train, validation and test first, then others by name.

    A single file has the one split "train"; for a hub id the hub is asked.

    Raises:
        DataError: there is no such source, or the folder holds no file that can be read.
    """
    path = _find_path(source)
    if path.is_dir():
        return tuple(_split_files(path))
    if path.is_file() or _looks_local(source):
        _check_file(path)
        return ("train",)
    return _ask_hub(lambda name, config: tuple(datasets.get_dataset_split_names(name, config)), source)


def _find_split(source: str | Path, split: str) -> _Split:
    path = _find_path(source)
    if not path.exists() and not _looks_local(source):
        return _hub_split(source, split)
    known = splits_of(source)
    if split not in known:
        raise DataError(f"{source}: has no split {split!r}{did_you_mean(split, known)}")
    classes = None
    if path.is_dir():
        classes = _declared_classes(path / "meta.json")
        path = _split_files(path)[split]
    return _Split(str(path), classes, lambda: read_records(path))


def _find_path(source: str | Path) -> Path:
    try:
        return find_path(source)
    except UnreadableError as error:
        raise DataError(f"{show(str(source))}: {error}; valid: a file, a folder or a hub id") from None


def _looks_local(source: str | Path) -> bool:
    """True for what cannot be a hub id: such an id has at most one slash and no suffix of a data file."""
    text = str(source)
    return (
        isinstance(source, Path) or Path(text).suffix in READERS or text.startswith((".", "/")) or text.count("/") > 1
    )


def _check_file(path: Path) -> None:
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path}: no such file or folder{did_you_mean(path.name, beside)}")
    if path.suffix.lower() not in READERS:
        raise DataError(f"{path}: got a {path.suffix or 'nameless'} file; valid: {', '.join(READERS)}")


def _split_files(folder: Path) -> dict[str, Path]:
    """The file of each split. Plain .json files count only under a usual name: others (meta, tasks) are not rows."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        suffix = path.suffix.lower()
        if suffix not in READERS or (suffix == ".json" and path.stem not in USUAL_SPLITS):
            continue
        if path.stem in files:
            raise DataError(f"{folder}: the split {path.stem!r} is in {files[path.stem].name} and {path.name}")
        files[path.stem] = path
    if not files:
        raise DataError(f"{folder}: holds no split; valid: train, validation, test with {', '.join(READERS)}")
    order = [name for name in USUAL_SPLITS if name in files]
    return {name: files[name] for name in [*order, *sorted(files.keys() - set(order))]}


def _declared_classes(meta: Path) -> tuple[str, ...] | None:
    if not meta.exists():
        return None
    try:
        content = read_json(meta)
    except (OSError, ValueError) as error:
        raise DataError(f"{meta}: not readable as JSON: {error}") from None
    return check_class_names(content.get("labels"), str(meta))


def _hub_split(source: str | Path, split: str) -> _Split:
    data = _ask_hub(lambda name, config: datasets.load_dataset(name, config, split=split), source)
    label = data.features.get("label")
    classes = tuple(label.names) if isinstance(label, datasets.ClassLabel) else None

    def records() -> Iterator[Record]:
        return ((f"row {number}", row) for number, row in enumerate(data, 1))

    return _Split(f"{source} ({split})", classes, records)


def _ask_hub(question: Callable[[str, str | None], Any], source: str | Path) -> Any:
    name, _, config = str(source).partition(":")
    try:
        return question(name, config or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"{source}: no such file or folder, and the hub answered: {error}") from error
