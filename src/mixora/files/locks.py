"""One process at a time in a folder: a lock on the folder itself, of which nothing stays behind, even after a kill."""

import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from mixora.errors import ConfigError


class FolderLock:
    """Held from `take` on until the end of a `with` block."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptor: int | None = None

    def __enter__(self) -> Self:
        return self

    def take(self) -> None:
        """`ConfigError` where another process has it.

        Nothing where this one has it already, where there is no such folder yet, or no lock in its file system.
        """
        if self._descriptor is not None or not self._folder.is_dir():
            return
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ConfigError(
                    f"out: {self._folder} is being written by another process; valid: another folder, or once that one "
                    "has ended"
                ) from None
            return
        self._descriptor = descriptor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
