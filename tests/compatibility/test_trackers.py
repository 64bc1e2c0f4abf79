"""What trackers of `report_to` write, read back from their files: each auxiliary term, step by step."""

import pytest
import torch
import transformers
import trl
from transformers import TrainingArguments

import mixora
from tests.training.setups import collate, dataset, make_model, make_tokenizer, settings

TRAINERS = {
    "transformers.Trainer": transformers.Trainer,
    "mixora.Trainer": mixora.Trainer,
    "trl.SFTTrainer": trl.SFTTrainer,
    "mixora.SFTTrainer": mixora.SFTTrainer,
}
PROJECT = "mixora-test"
TERMS = ["train/load_balance", "train/z_loss"]


def under_each(tracker):
    """The test under each trainer, as a line of the table."""
    lines = [
        pytest.param(
            trainer, marks=pytest.mark.works_with(tracker, f"`report_to` of {name}: each auxiliary term"), id=name
        )
        for name, trainer in TRAINERS.items()
    ]
    return pytest.mark.parametrize("trainer_class", lines)


def train(trainer_class, folder, tracker):
    """Three steps: what the trainer remembers of each term, by step."""
    changes = {"max_steps": 3, "learning_rate": 0.05, "report_to": [tracker], "project": PROJECT}
    if issubclass(trainer_class, trl.SFTTrainer):
        changes |= {"bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments, of_trl = trl.SFTConfig, {"processing_class": make_tokenizer()}
    else:
        arguments, of_trl = TrainingArguments, {}
    ours = trainer_class in (mixora.Trainer, mixora.SFTTrainer)
    trainer = trainer_class(
        model=make_model(**{"losses.z_loss.coefficient": 0.1}),
        args=arguments(**settings(folder, **changes)),
        train_dataset=dataset(),
        data_collator=collate,
        callbacks=[] if ours else [mixora.AuxiliaryLossCallback()],
        **of_trl,
    )
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    terms = [*TERMS, "train/auxiliary_loss"] if ours else TERMS
    return {term: [(line["step"], line[term.removeprefix("train/")]) for line in lines] for term in terms}


def assert_same(found, expected):
    for term, values in expected.items():
        assert len(values) == 3
        assert [step for step, _ in found[term]] == [step for step, _ in values]
        torch.testing.assert_close([v for _, v in found[term]], [v for _, v in values], rtol=1e-6, atol=0)
        assert len({value for _, value in values}) == 3


@under_each("TensorBoard")
def test_tensorboard(trainer_class, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    expected = train(trainer_class, tmp_path, "tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    assert_same({term: [(e.step, e.value) for e in events.Scalars(term)] for term in expected}, expected)


@under_each("trackio")
def test_trackio(trainer_class, tmp_path, monkeypatch):
    from trackio import sqlite_storage, utils

    for module in (sqlite_storage, utils):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path)
    expected = train(trainer_class, tmp_path, "trackio")
    assert (tmp_path / f"{PROJECT}.db").is_file()
    (run,) = sqlite_storage.SQLiteStorage.get_runs(PROJECT)
    lines = sqlite_storage.SQLiteStorage.get_logs(PROJECT, run)
    found = {term: [(row["train/global_step"], row[term]) for row in lines if term in row] for term in expected}
    assert_same(found, expected)
