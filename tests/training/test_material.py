"""What cannot be trained on is found with the rows, also by a rehearsal, which reads no weights."""

import pytest
import torch

from mixora.bases import count_positions
from mixora.errors import ConfigError, DataError
from mixora.training.rehearsal import rehearse
from mixora.training.rows import read_tasks
from mixora.training.run_config import read_run
from tests import models
from tests.training.conftest import command_rows, write_rows
from tests.training.test_run import run, settings

TAKES_64 = [models.tiny_gpt2, models.tiny_opt, models.tiny_bart]


def rehearsed(tree):
    return rehearse(read_run(tree))


@pytest.mark.parametrize("build", [*TAKES_64, models.tiny_bert_classifier, models.tiny_roberta_classifier])
def test_a_table_of_positions_takes_rows_up_to_its_end(build):
    model = build().eval()
    most = count_positions(model)
    assert most == 64 or build not in TAKES_64
    with torch.no_grad():
        model(input_ids=torch.full((1, most), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


@pytest.mark.parametrize("build", [models.tiny_llama, models.tiny_t5])
def test_computed_positions_have_no_end(build):
    assert count_positions(build()) is None


@pytest.mark.parametrize("try_out", [run, rehearsed])
def test_rows_longer_than_the_positions_of_the_base(try_out, bases, tmp_path):
    write_rows(tmp_path, "rows", [{"text": "long " * 30 + str(n % 2), "label": n % 2} for n in range(12)])
    tree = settings(bases / "bert", tmp_path / "rows.jsonl", tmp_path / "out", data__max_length=140)
    tree["evaluate"] = {}
    with pytest.raises(
        ConfigError, match=r"data\.max_length: got 140, and a row has 140 tokens; valid for .*: at most 128"
    ):
        try_out(tree)
    tree["data"]["max_length"] = 128
    try_out(tree)


@pytest.mark.parametrize("try_out", [run, rehearsed])
@pytest.mark.parametrize("label", ["same", 0])
def test_one_class_is_none(try_out, label, bases, tmp_path):
    write_rows(tmp_path, "rows", [{"text": str(n), "label": label} for n in range(12)])
    tree = {**settings(bases / "bert", tmp_path / "rows.jsonl", tmp_path / "out"), "evaluate": {}}
    with pytest.raises(DataError, match=rf"rows.jsonl.*: '{label}' is the only class; valid: two classes or more"):
        try_out(tree)


def test_a_rehearsal_counts_the_rows_that_are_measured(bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out", evaluate__limit=3)
    assert rehearsed(tree).evaluation_rows == 3


def test_a_rehearsal_tells_of_an_unknown_metric(bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out", evaluate__metrics=["los"])
    with pytest.raises(ConfigError, match=r"metrics: got 'los'.*did you mean 'loss'"):
        rehearsed(tree)


@pytest.mark.parametrize("name", ["valid", "val", "dev"])
def test_validation_rows_by_another_name(name, tmp_path):
    write_rows(tmp_path, "train", command_rows(20))
    write_rows(tmp_path, name, command_rows(3))
    write_rows(tmp_path, "test", command_rows(5))
    tree = settings("base", tmp_path, tmp_path / "out")
    (rows,) = read_tasks(read_run(tree), to_train=True)[0].values()
    assert (len(rows.train), len(rows.evaluation)) == (20, 3)
    write_rows(tmp_path, "validation", command_rows(7))
    (rows,) = read_tasks(read_run(tree), to_train=True)[0].values()
    assert (len(rows.train), len(rows.evaluation)) == (20, 7)


def test_two_splits_that_may_be_the_validation_rows(tmp_path):
    for name in ("train", "dev", "val"):
        write_rows(tmp_path, name, command_rows(4))
    config = read_run(settings("base", tmp_path, tmp_path / "out"))
    with pytest.raises(DataError, match=r"the splits val and dev, either of.*valid: data\.evaluation_split=val, or"):
        read_tasks(config, to_train=True)


def test_a_field_to_group_by_that_no_row_has(tmp_path):
    write_rows(tmp_path, "train", command_rows(20))
    tree = settings("base", tmp_path, tmp_path / "out", data__group_by="domian")
    with pytest.raises(ConfigError, match=r"data\.group_by: got 'domian'.*no row has; did you mean 'domain'"):
        read_tasks(read_run(tree), to_train=True)
    assert read_tasks(read_run(tree), to_train=False)
