"""The result of a run on other rows: they are numbered by its classes, and none of them is held out."""

import json
import shutil

import pytest

from mixora.data import read_rows
from mixora.errors import CheckpointError, DataError
from mixora.training.merging import merge_folder
from mixora.training.results import reopen
from tests.training.conftest import write_rows
from tests.training.test_run import quiet, run, settings


def rows_of(*labels, count=40):
    return [{"text": f"{labels[n % len(labels)]} {n}", "label": labels[n % len(labels)]} for n in range(count)]


@pytest.fixture(scope="module")
def classifier(bases, tmp_path_factory):
    """The folder of a run on one file of ham and spam."""
    folder = tmp_path_factory.mktemp("classifier")
    write_rows(folder, "rows", rows_of("ham", "spam"))
    tree = settings(bases / "bert", folder / "rows.jsonl", folder / "run")
    tree["evaluate"] = {}
    _, record = run(tree)
    assert record.labels == ["ham", "spam"]
    return folder / "run"


def measure(folder, place, rows):
    write_rows(place, "other", rows)
    return reopen(folder, {"data": {"source": str(place / "other.jsonl")}}, quiet()).measure()


def forget_classes(folder, place):
    """A copy of the run as it would have been made before records named classes."""
    old = shutil.copytree(folder, place / "old")
    record = json.loads((old / "record.json").read_text())
    del record["labels"]
    (old / "record.json").write_text(json.dumps(record))
    return old


@pytest.mark.parametrize("is_old", [False, True])
def test_classes_keep_their_numbers(is_old, classifier, tmp_path):
    folder = forget_classes(classifier, tmp_path) if is_old else classifier
    with pytest.raises(DataError, match=r"'label' is 'virus', an unknown class .*ham.*spam"):
        measure(folder, tmp_path, rows_of("spam", "virus"))
    rows = rows_of("ham", "spam")
    ham, spam = ([row for row in rows if row["label"] == name] for name in ("ham", "spam"))
    alone = [measure(folder, tmp_path, part)["accuracy"] for part in (ham, spam)]
    both = measure(folder, tmp_path, rows)["accuracy"]
    assert both == pytest.approx(sum(alone) / 2) and alone[0] != alone[1]


def test_another_file_is_taken_whole_and_the_run_s_own_is_not(classifier, tmp_path):
    own = classifier.parent / "rows.jsonl"
    assert measure(classifier, tmp_path, rows_of("ham", "spam", count=30))["rows"] == 30
    (tmp_path / "link.jsonl").symlink_to(own)
    for changes, rows in [
        ({}, 4),
        ({"data": {"source": str(tmp_path / "link.jsonl")}}, 4),
        ({"data": {"evaluation_split": "train"}}, 40),
        ({"data": {"source": str(tmp_path / "other.jsonl")}, "evaluate": {"limit": 7}}, 7),
    ]:
        assert reopen(classifier, changes, quiet()).measure()["rows"] == rows
    with pytest.raises(DataError, match="no split 'test'"):
        reopen(classifier, {"data": {"source": str(tmp_path / "other.jsonl"), "evaluation_split": "test"}}, quiet())


def test_rows_of_the_other_kind_are_refused(classifier, bases, tmp_path):
    with pytest.raises(
        DataError, match=r"got 'text' rows for a run whose model tells classes apart.*: classification,"
    ):
        measure(classifier, tmp_path, [{"text": "a"}])
    write_rows(tmp_path, "texts", [{"text": f"a {n}"} for n in range(12)])
    run(settings(bases / "llama", tmp_path / "texts.jsonl", tmp_path / "run"))
    with pytest.raises(DataError, match=r"got 'classification' rows for a run whose model writes text; .*completion"):
        measure(tmp_path / "run", tmp_path, rows_of("ham", "spam"))


def test_an_old_run_whose_rows_are_gone_says_so(classifier, tmp_path):
    old = forget_classes(classifier, tmp_path)
    settings = (old / "run.yaml").read_text()
    (old / "run.yaml").write_text(settings.replace(str(classifier.parent / "rows.jsonl"), str(tmp_path / "gone.jsonl")))
    with pytest.raises(CheckpointError, match=r"its record names no classes, and its rows cannot be read: .*gone"):
        measure(old, tmp_path, rows_of("ham", "spam"))


def test_whole_numbers_are_no_classes_of_a_run_on_numbers(bases, tmp_path):
    write_rows(tmp_path, "rows", [{"text": f"a {n}", "label": n / 4} for n in range(20)])
    _, record = run(settings(bases / "llama", tmp_path / "rows.jsonl", tmp_path / "out"))
    assert record.labels == []
    found = measure(tmp_path / "out", tmp_path, [{"text": f"a {n}", "label": n % 5} for n in range(6)])
    assert set(found) == {"pearson", "spearman", "rows"}
    rows = read_rows(tmp_path / "other.jsonl", labels=())
    assert rows.labels is None and [row["label"] for row in rows] == [0.0, 1.0, 2.0, 3.0, 4.0, 0.0]


def test_rows_to_merge_by_may_lack_a_class(classifier, tmp_path):
    write_rows(tmp_path, "other", rows_of("spam"))
    changes = {"data": {"source": str(tmp_path / "other.jsonl")}}
    merged = merge_folder(classifier, tmp_path / "merged", changes, quiet(), fit_rows=8, rank=2)
    assert "other.jsonl" in merged.fitted_on and merged.sites
