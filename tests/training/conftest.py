import json
import os
import shutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock

from tests.characters import save_bases
from tests.training.ranks import run_two_ranks

DOMAINS = {"lamp": ["kitchen", "hall", "attic"], "song": ["jazz", "folk", "soul"]}


def command_rows(count):
    """Commands and the calls they mean, over two domains."""
    rows = []
    for n in range(count):
        domain = list(DOMAINS)[n % 2]
        word = DOMAINS[domain][n // 2 % 3]
        rows.append({"prompt": f"{domain} {word} {n}", "completion": f"{domain}(what={word}; n={n})", "domain": domain})
    return rows


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Folders of tiny saved models of three kinds with a tokenizer of characters."""
    root = tmp_path_factory.mktemp("bases")
    save_bases(root)
    return root


def write_rows(folder, split, rows):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def two_ranks(bases, shared_folder):
    """What two gloo ranks found, by part: see `two_ranks.py`. `folder` is the one they worked in.

    Run once, also where several processes share the tests.
    """
    folder = shared_folder / "two_ranks"
    with FileLock(f"{folder}.lock"):
        if (folder / "found.pt").exists():
            return {**torch.load(folder / "found.pt", weights_only=True), "folder": folder}
        shutil.copytree(bases / "llama", folder / "base", dirs_exist_ok=True)
        write_rows(folder / "rows", "train", command_rows(32))
        write_rows(folder / "rows", "validation", command_rows(40)[32:])
        return {**run_two_ranks(folder), "folder": folder}


@pytest.fixture
def data(tmp_path):
    """Folders `commands` and `classes` with train and validation rows."""

    def write(name, split, rows):
        write_rows(tmp_path / "data" / name, split, rows)

    classes = [{"text": row["prompt"], "label": row["domain"], "lang": "en"} for row in command_rows(24)]
    write("commands", "train", command_rows(32))
    write("commands", "validation", command_rows(40)[32:])
    write("classes", "train", classes[:16])
    write("classes", "validation", classes[16:])
    return tmp_path / "data"
