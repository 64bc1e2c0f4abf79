"""What a finished run left for rows that its model meets later."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from mixora.config import parse
from mixora.diagnostics.record import read_record
from mixora.errors import CheckpointError, DataError
from mixora.files.documents import UnreadableError, find_path
from mixora.loading import read_adapter_config, task_of
from mixora.training.rows import Past, labels_of, read_tasks
from mixora.training.run_config import RunConfig, read_settings
from mixora.training.run_folder import RUN_FILE


def read_past(run: Path) -> Past:
    """Of the run in a folder; `CheckpointError` where the classes of its head can no more be told."""
    config = parse(RunConfig, read_settings(run / RUN_FILE))
    is_labelled = task_of(read_adapter_config(run / "adapter")) == "sequence-classification"
    return Past(_read_labels(run, config) if is_labelled else None, frozenset(_places(config)))


def _read_labels(run: Path, config: RunConfig) -> tuple[str, ...]:
    """From the record; of a run whose record does not say, from the rows that it was trained on."""
    labels = find_labels(run)
    if labels is not None:
        return labels
    try:
        _, rows = read_tasks(config, to_train=False)
    except DataError as error:
        raise CheckpointError(f"{run}: its record names no classes, and its rows cannot be read: {error}") from None
    return labels_of(rows) or ()


def find_labels(run: Path) -> tuple[str, ...] | None:
    """The class names that the record of a run tells; None where the folder holds no record, or the record no names."""
    with suppress(CheckpointError):
        labels = read_record(run).labels
        return None if labels is None else tuple(labels)
    return None


def _places(config: RunConfig) -> Iterator[Path]:
    """Where its rows come from."""
    for task in config.data.by_task().values():
        # what cannot be looked at is not what is read now
        with suppress(UnreadableError):
            yield find_path(task.source).resolve()
