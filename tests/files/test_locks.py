import os
import signal
import subprocess
import sys

import pytest

from mixora.errors import ConfigError
from mixora.files.locks import FolderLock

HOLDER = """
import sys
from pathlib import Path
from mixora.files.locks import FolderLock
with FolderLock(Path(sys.argv[1])) as lock:
    lock.take()
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_at_a_time(tmp_path):
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.take()
        first.take()
        with pytest.raises(ConfigError, match=r"out: .* is being written by another process; valid: another folder"):
            second.take()
    with FolderLock(tmp_path) as third:
        third.take()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_made_later(tmp_path):
    with FolderLock(tmp_path / "new") as lock:
        lock.take()
        (tmp_path / "new").mkdir()
        lock.take()
        with FolderLock(tmp_path / "new") as other, pytest.raises(ConfigError):
            other.take()


@pytest.mark.parametrize("is_killed", [False, True])
def test_it_ends_with_its_process(is_killed, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout.readline() == "held\n"
        with FolderLock(tmp_path) as lock, pytest.raises(ConfigError):
            lock.take()
        if is_killed:
            os.kill(holder.pid, signal.SIGKILL)
        holder.communicate(timeout=60)
        with FolderLock(tmp_path) as lock:
            lock.take()
