"""Folders and files for results: nothing is replaced unless asked, and nothing that mixora did not write."""

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from mixora.errors import ConfigError
from mixora.files.asides import ASIDE
from mixora.files.documents import UnreadableError, find_path, show

MARK = ".mixora"
"""A file in every folder that mixora claimed, by which it knows its own."""


def check_folder(out: str | Path, overwrite: bool = False, reads: Iterable[str | Path] = ()) -> Path:
    """The path of the folder that `claim_folder` would make with the same arguments; changes nothing.

    Raises `ConfigError` if it holds something and may not be replaced, if replacing it would remove one of the paths
    in `reads` or a result that lies in it, or if it cannot be written.
    """
    try:
        folder = find_path(out)
        is_used = _holds_something(folder)
    except (UnreadableError, OSError) as error:
        raise ConfigError(
            f"out: {show(str(out), 5000)} cannot be written: {error}; valid: a folder that can be"
        ) from None
    if is_used:
        _check_replaceable(folder, overwrite, reads)
    above = folder.absolute()
    while not above.exists() and not above.is_symlink():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        reason = "no permission" if above.is_dir() else f"{above} is no folder"
        raise ConfigError(f"out: {folder} cannot be written: {reason}; valid: a folder that can be written")
    return folder


def _holds_something(folder: Path) -> bool:
    """A process that was killed when it had claimed a folder left the mark and perhaps half a file aside."""
    return folder.is_dir() and any(path.name not in (MARK, ASIDE) for path in folder.iterdir())


def _check_replaceable(folder: Path, overwrite: bool, reads: Iterable[str | Path]) -> None:
    if not overwrite:
        raise ConfigError(
            f"out: {folder} is not empty; valid: a folder that is new or empty, or --overwrite to replace what is there"
        )
    if not (folder / MARK).is_file():
        raise ConfigError(
            f"out: {folder} was not written by mixora, so --overwrite leaves it alone; valid: another folder"
        )
    for path in reads:
        read = Path(os.path.expanduser(path)).resolve()
        if folder.resolve() in (read, *read.parents) and read.exists():
            raise ConfigError(f"out: {folder} holds {path}, which is read; valid: another folder")
    for mark in folder.rglob(MARK):
        if mark.parent != folder:
            raise ConfigError(
                f"out: {folder} holds {mark.parent}, a result by itself, which would go too; "
                "valid: another folder, or move that one first"
            )


def claim_folder(out: str | Path, overwrite: bool = False, reads: Iterable[str | Path] = ()) -> Path:
    """Make the folder `out`, empty but for a mark; with `overwrite` what mixora wrote there goes.

    Raises `ConfigError` as `check_folder` does.
    """
    folder = check_folder(out, overwrite, reads)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # the mark stays, by which a folder that was emptied in part is known as ours
        for path in sorted(path for path in folder.iterdir() if path.name != MARK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        (folder / MARK).write_text("This folder was written by mixora, which may replace it when told to.\n")
    except OSError as error:
        raise ConfigError(f"out: {folder} cannot be written: {error}; valid: a folder that can be written") from None
    return folder


def write_text(path: Path, text: str, overwrite: bool = False) -> Path:
    """Write the file `out`; `ConfigError` if it is there already and may not be replaced, or cannot be written."""
    if path.exists() and not (overwrite and path.is_file()):
        valid = "another file" if path.is_dir() else "another file, or --overwrite to replace it"
        raise ConfigError(f"out: {path} is there already; valid: {valid}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"out: {path} cannot be written: {error}") from None
    return path
