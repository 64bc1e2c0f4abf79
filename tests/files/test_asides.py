"""Files and folders are there whole or not at all."""

import errno
import os

import pytest

from mixora.errors import UnwrittenError
from mixora.files.asides import ASIDE, discard, writing


def fill(path, text):
    path.mkdir()
    (path / "part").write_text(text)


def test_a_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    for text in ("old", "new"):
        with writing(tmp_path / "file.txt") as path:
            path.write_text(text)
            assert path.suffix == ".txt"
            assert text == "old" or (tmp_path / "file.txt").read_text() == "old"
        assert (tmp_path / "file.txt").read_text() == text
    assert os.listdir(tmp_path) == ["file.txt"]


def test_a_folder_does_so_too_and_goes_whole(tmp_path):
    for text in ("old", "new"):
        with writing(tmp_path / "folder") as path:
            fill(path, text)
        assert (tmp_path / "folder" / "part").read_text() == text
    discard(tmp_path / "folder")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("error", [RuntimeError("a fault"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_one(error, tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(type(error)), writing(tmp_path / "file") as path:
        path.write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_what_a_killed_process_left_is_in_nobodys_way(tmp_path):
    fill_at = tmp_path / ASIDE
    fill_at.mkdir()
    fill(fill_at / "folder", "half")
    with writing(tmp_path / "folder") as path:
        fill(path, "new")
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (Exception("Error while serializing: I/O error: File too large (os error 27)"), "File too large"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos"), "PyTorch could not write a file"),
    ],
)
def test_a_full_disk_is_told(error, told, tmp_path):
    match = rf"{tmp_path}/file: could not be written: {told}.*; [\d,.]+ MiB are free there"
    with pytest.raises(UnwrittenError, match=match), writing(tmp_path / "file"):
        raise error
    assert os.listdir(tmp_path) == []
