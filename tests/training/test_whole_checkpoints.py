"""Checkpoints of a trainer of ours: there whole or not at all, on a full disk too, and read without running code."""

import os
import pickle
import resource
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

import mixora
from mixora.errors import CheckpointError, UnwrittenError
from mixora.files.asides import ASIDE
from mixora.training import whole_checkpoints
from mixora.training.checkpoints import read_state
from mixora.training.costs import Clock
from mixora.training.manifest import MANIFEST, find_damage, write_manifest
from tests.training.setups import collate, dataset, make_model, settings
from tests.training.setups import make_trainer as make_any


def make_trainer(folder, callbacks=(), **changes):
    # a checkpoint falls between two log lines
    steps = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps", "logging_steps": 4}
    arguments = {"learning_rate": 0.05, "disable_tqdm": True, **steps, **changes}
    model = make_model(expert_dropout=0.4)
    trainer = mixora.Trainer(
        model=model,
        args=TrainingArguments(**settings(folder, **arguments)),
        train_dataset=dataset(),
        eval_dataset=dataset().select(range(4)),
        data_collator=collate,
        callbacks=list(callbacks),
    )
    keep_off_the_hub(model)
    return trainer


def keep_off_the_hub(model):
    """Where saving would look for changed embeddings."""
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def losses(trainer):
    return [line for line in trainer.state.log_history if "loss" in line]


def equal(one, other):
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs) and losses(one) == losses(other)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training without interruption, with checkpoints of steps 2 and 4."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), [Clock()])
    trainer.train()
    return trainer


@pytest.fixture
def checkpoint(whole, tmp_path):
    """That of step 2, to spoil."""
    return Path(shutil.copytree(Path(whole.args.output_dir) / "checkpoint-2", tmp_path / "checkpoint-2"))


def test_older_checkpoints_go_when_the_new_one_stands(tmp_path, monkeypatch):
    standing = []

    def write(aside):
        standing.append((str(aside.relative_to(tmp_path)), names(tmp_path)))
        write_manifest(aside)

    monkeypatch.setattr(whole_checkpoints, "write_manifest", write)
    make_trainer(tmp_path, save_total_limit=1).train()
    assert standing == [
        (f"{ASIDE}/checkpoint-2", [ASIDE]),
        (f"{ASIDE}/checkpoint-4", [ASIDE, "checkpoint-2"]),
    ]
    assert names(tmp_path) == ["checkpoint-4"]
    assert find_damage(tmp_path / "checkpoint-4") is None


def test_what_was_read_since_the_last_log_line_goes_on(whole, checkpoint, tmp_path):
    resumed = make_trainer(tmp_path / "parts", [clock := Clock.of(read_state(checkpoint))])
    before = clock.seconds
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses(whole)) == 1 and "routing/evenness" in losses(whole)[0]
    assert equal(resumed, whole)
    assert 0 < before < clock.seconds and Clock.of(None).seconds == 0


def test_the_best_checkpoint_is_named_where_it_stands(tmp_path):
    make = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(tmp_path, save_total_limit=1, **make)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{trainer.state.best_global_step}")
    assert os.path.isdir(trainer.state.best_model_checkpoint)
    for name in names(tmp_path):
        stored = whole_checkpoints.find_damage(tmp_path / name)
        assert stored is None
        assert ASIDE not in (tmp_path / name / "trainer_state.json").read_text()


def test_a_damaged_checkpoint_is_refused(checkpoint, tmp_path):
    path = checkpoint / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"checkpoint-2: is damaged: optimizer.pt has"):
        make_trainer(tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))


def test_trl_writes_whole_checkpoints_too(tmp_path):
    steps = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "learning_rate": 0.05, "seed": 0}
    whole, parts = (make_any(mixora.SFTTrainer, tmp_path / name, **steps) for name in ("whole", "parts"))
    for trainer in (whole, parts):
        keep_off_the_hub(trainer.model)
    whole.train()
    assert {"checkpoint-1", "checkpoint-2"} <= set(names(tmp_path / "whole")) and ASIDE not in names(tmp_path / "whole")
    assert find_damage(tmp_path / "whole" / "checkpoint-1") is None
    parts.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True))


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "readings_0.pt"])
def test_going_on_runs_no_code_of_the_files(name, checkpoint, tmp_path):
    torch.save({"state": Hostile(tmp_path / "done")}, checkpoint / name)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        make_trainer(tmp_path / "parts").train(resume_from_checkpoint=str(checkpoint))
    assert not (tmp_path / "done").exists()


@contextmanager
def small_disk(folder):
    """A file system with room for one checkpoint and a half."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", folder], capture_output=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def small_files(folder):
    """No file may grow beyond what a checkpoint needs, after the first one."""
    folder.mkdir()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class Limit(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize(("limit", "callbacks"), [(small_disk, []), (small_files, [Limit()])])
def test_a_full_disk_leaves_the_previous_checkpoint(limit, callbacks, whole, tmp_path):
    folder = tmp_path / "small"
    with limit(folder):
        told = (
            rf"{folder}/checkpoint-4: could not be written: .*; .* MiB are free there; left: checkpoint-2 in {folder}"
        )
        with pytest.raises(UnwrittenError, match=told):
            make_trainer(folder, callbacks).train()
        assert names(folder) == ["checkpoint-2"]
        assert find_damage(folder / "checkpoint-2") is None
        # there is room elsewhere
        resumed = make_trainer(tmp_path / "elsewhere")
        resource.setrlimit(resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE)[1:] * 2)
        resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert equal(resumed, whole)
