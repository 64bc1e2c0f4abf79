import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import json

import pytest

from tests.characters import build_tokenizer


@pytest.fixture
def plain_tokenizer():
    return build_tokenizer()


@pytest.fixture
def chat_tokenizer():
    return build_tokenizer(chat=True)


@pytest.fixture
def make_tokenizer():
    return build_tokenizer


@pytest.fixture
def write(tmp_path):
    """Writes rows (dicts) or raw bytes under a name and gives the path."""

    def put(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        else:
            path.write_text(json.dumps(content), encoding="utf-8")
        return path

    return put
