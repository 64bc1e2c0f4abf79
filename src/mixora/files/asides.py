"""Files and folders that are there whole or not at all: written aside, flushed to disk, and renamed.

What a killed process had not finished lies in a folder `.writing`, beside where it would have gone.
"""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mixora.errors import UnwrittenError

ASIDE = ".writing"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Where to write what shall stand at `path`, a file or a folder; at the end it takes the place of what was there.

    Raises `UnwrittenError` where the disk is full; `path` is then as it was.
    """
    aside = path.parent / ASIDE / path.name
    try:
        aside.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        yield aside
        settle(aside, path)
    except Exception as error:
        if reason := why_unwritten(error):
            remove(aside)
            raise UnwrittenError(f"{path}: could not be written: {reason}; {tell_room(path)}") from error
        raise
    finally:
        remove(aside)
        leave(aside.parent)


def settle(aside: Path, path: Path) -> None:
    """Flush the file or folder `aside` to disk and rename it to `path`, on the same file system."""
    flush(aside)
    former = aside.parent / f"former-{path.name}"
    if path.is_dir():
        # a folder that holds something is not replaced by a rename
        remove(former)
        path.rename(former)
    aside.replace(path)
    flush(path.parent, deep=False)
    remove(former)


def flush(path: Path, deep: bool = True) -> None:
    """Return when the disk has a file, or a folder with what is in it."""
    if deep and path.is_dir():
        for inner in path.iterdir():
            flush(inner)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder; it is gone at once, or there whole."""
    aside = folder.parent / ASIDE / f"former-{folder.name}"
    aside.parent.mkdir(exist_ok=True)
    remove(aside)
    folder.rename(aside)
    remove(aside)
    leave(aside.parent)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there; for what nobody will miss."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def leave(aside: Path) -> None:
    """Remove the folder for unfinished files where nothing else is written there."""
    try:
        aside.rmdir()
    except OSError:
        return


def why_unwritten(error: Exception) -> str | None:
    """The reason where a disk took no more, as files, safetensors and PyTorch say it; None for other errors."""
    text, number = str(error), number_of(error)
    if number in FULL:
        return os.strerror(number)
    # PyTorch's writer does not tell the system's number
    is_writer = isinstance(error, RuntimeError) and ("inline_container" in text or "PytorchStreamWriter" in text)
    return "PyTorch could not write a file to its end" if is_writer else None


def number_of(error: Exception) -> int | None:
    """The system's number of an error; libraries in Rust raise errors of their own that end with it."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def tell_room(path: Path) -> str:
    """How much the file system takes yet."""
    above = next(place for place in (path, *path.absolute().parents) if place.exists())
    return f"{shutil.disk_usage(above).free / 2**20:,.1f} MiB are free there"
