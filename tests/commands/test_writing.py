"""Commands that write: a rehearsal leaves everything as it is, and nothing is replaced unless asked."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from mixora.cli import app
from mixora.files.folders import MARK
from tests.commands.test_cli import SHORT, SMALL
from tests.conversion.test_crafted import write
from tests.training.conftest import bases, command_rows  # noqa: F401 - fixture


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def place(bases, tmp_path_factory):  # noqa: F811
    """Rows, a base, a finished run, and a checkpoint to convert."""
    place = tmp_path_factory.mktemp("place")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in command_rows(12)))
    shutil.copytree(bases / "llama", place / "base")
    write(place / "released")
    assert call(*commands(place)["train"], "--out", place / "run").exit_code == 0
    return place


def commands(place):
    return {
        "train": ["train", *SMALL, *SHORT, "--model", place / "base", "--data", place / "rows.jsonl"],
        "craft": ["craft", "--model", place / "base", "adapter.num_experts=2", "adapter.top_k=1", "adapter.rank=2"],
        "convert": ["convert", place / "released"],
        "export": ["export", place / "run", "--to", "peft-lora", "--approximate", "--fit-rows", 4, "--rank", 2],
    }


def state_of(folder):
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in folder.rglob("*")
    }


NAMES = ["train", "craft", "convert", "export"]


@pytest.mark.parametrize("name", NAMES)
def test_a_rehearsal_writes_nothing(name, place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = state_of(place), state_of(tmp_path)
    result = call(*commands(place)[name], "--out", tmp_path / "new", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "nothing was written" in result.output and str(tmp_path / "new") in "".join(result.output.split("\n"))
    found = json.loads(call(*commands(place)[name], "--out", tmp_path / "new", "--dry-run", "--json").output)
    assert found["plan" if name == "train" else "sites"]
    assert (state_of(place), state_of(tmp_path)) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_rehearsal_says_that_the_folder_is_taken(name, place, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    words = [*commands(place)[name], "--out", tmp_path / "mine", "--dry-run"]
    for more, message in [([], "is not empty"), (["--overwrite"], "was not written by mixora")]:
        result = call(*words, *more)
        assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.parametrize("name", NAMES)
def test_only_what_mixora_wrote_is_replaced_and_only_when_asked(name, place, tmp_path):
    words = [*commands(place)[name], "--out", tmp_path / "out"]
    assert call(*words).exit_code == 0
    (tmp_path / "out" / "stale").write_text("of the first time")
    before = state_of(tmp_path)
    refused = call(*words)
    assert refused.exit_code == 2 and "--overwrite" in refused.output and state_of(tmp_path) == before
    result = call(*words, "--overwrite")
    assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert MARK in names and "stale" not in names and len(names) > 1


def test_what_is_read_is_never_replaced(place):
    before = state_of(place / "run")
    for words in (commands(place)["export"], ["craft", "--model", place / "run" / "adapter"]):
        result = call(*words, "--out", place / "run", "--overwrite")
        assert result.exit_code == 2 and "which is read" in " ".join(result.output.split())
    assert state_of(place / "run") == before


def test_a_rehearsal_of_a_run_tells_the_steps_and_the_plan(place, tmp_path):
    words = [*commands(place)["train"], "--out", tmp_path / "out", "--dry-run", "--json"]
    found = json.loads(call(*words, "train.epochs=3.0", "train.gradient_accumulation=2", "train.steps=null").output)
    # 11 rows in batches of 4: 3 batches, 2 steps an epoch
    assert found["steps"] == 6 and found["train_rows"] == 11 and found["evaluation_rows"] == 1
    planned = json.loads(call("plan", *SMALL[:3], "--model", place / "base", "--json").output)
    assert found["plan"] == planned["sites"]
    unknown = json.loads(call(*words, "adapter.allocator={kind: spectral}", "adapter.budget=9000").output)
    assert unknown["plan"] is None and unknown["memory"] is None


def test_a_merge_is_foreseen_as_it_happens(place, tmp_path):
    words = [*commands(place)["export"], "--json"]
    foreseen = json.loads(call(*words, "--out", tmp_path / "a", "--dry-run").output)
    merged = json.loads(call(*words, "--out", tmp_path / "a").output)
    assert foreseen["form"] == merged["form"]
    assert foreseen["sites"] == {site["path"]: site["method"] for site in merged["sites"]}
    refused = call("export", place / "run", "--to", "peft-lora", "--out", tmp_path / "b", "--dry-run")
    assert refused.exit_code == 2 and "--approximate" in refused.output


def test_a_tilde_that_no_shell_has_read(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(place)
    for name in NAMES:
        assert call(*commands(place)[name], f"--out=~/{name}").exit_code == 0
        assert (tmp_path / name / MARK).is_file()
    assert not (place / "~").exists()
