"""Interrupted runs: what stays, and that going on ends with the weights of a run that nobody stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from mixora.cli import app
from mixora.errors import CheckpointError, ConfigError, StoppedError, UnwrittenError
from mixora.files.asides import ASIDE
from mixora.files.folders import MARK
from mixora.files.locks import FolderLock
from mixora.training import run as running
from mixora.training.arguments import make_arguments
from mixora.training.checkpoints import clear_leftovers, find_checkpoint, read_resumed, resumable
from mixora.training.manifest import write_manifest
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.test_run import quiet, settings


def tree_of(bases, data, out, **changes):
    tree = settings(bases / "llama", data / "commands", out, train__steps=12, train__schedule="cosine")
    tree["adapter"] |= {"dropout": 0.1}
    tree["train"] |= changes
    return tree


def stop_at(monkeypatch, step, number=signal.SIGINT, times=1):
    """The signal comes during the given step of the next run."""

    class Signal(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == step - 1:
                for _ in range(times):
                    os.kill(os.getpid(), number)
                    time.sleep(0.01)

    make = running.make_trainer

    def make_trainer(*given):
        trainer = make(*given)
        trainer.add_callback(Signal())
        return trainer

    monkeypatch.setattr(running, "make_trainer", make_trainer)


def weights_of(out):
    return load_file(out / "adapter" / "adapter_model.safetensors")


def same_weights(one, other):
    expected, found = weights_of(one), weights_of(other)
    return expected.keys() == found.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def stopped(config, monkeypatch, step, **how):
    with monkeypatch.context() as patch:
        stop_at(patch, step, **how)
        with pytest.raises(StoppedError) as caught:
            fit(config, quiet())
    return str(caught.value)


# step 10 is in the second epoch: 32 rows in batches of 4
@pytest.mark.parametrize(
    ("step", "number", "changes"),
    [
        (3, signal.SIGINT, {}),
        (10, signal.SIGTERM, {}),
        (4, signal.SIGINT, {"gradient_accumulation": 2}),
        (12, signal.SIGINT, {}),
    ],
)
def test_a_resumed_run_ends_with_the_same_weights(step, number, changes, bases, data, tmp_path, monkeypatch):
    whole = fit(read_run(tree_of(bases, data, tmp_path / "whole", **changes)), quiet())
    config = read_run(tree_of(bases, data, tmp_path / "parts", **changes))
    message = stopped(config, monkeypatch, step, number=number)
    assert f"after step {step} of 12" in message and f"mixora train --resume {tmp_path / 'parts'}" in message
    resumed = fit(read_resumed(tmp_path / "parts", {}), quiet(), resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")
    assert resumed.history == whole.history
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert {path.name for path in (tmp_path / "parts").iterdir()} == {p.name for p in (tmp_path / "whole").iterdir()}


@pytest.mark.parametrize(("recipe", "base", "rows"), [("adamix-lora", "t5", "commands"), ("sira", "bert", "classes")])
def test_drawn_routes_and_new_heads_go_on_too(recipe, base, rows, bases, data, tmp_path, monkeypatch):
    trees = [settings(bases / base, data / rows, tmp_path / name, train__steps=6) for name in ("whole", "parts")]
    for tree in trees:
        tree["adapter"] = {"recipe": recipe, "num_experts": 4, "rank": 2}
    fit(read_run(trees[0]), quiet())
    stopped(read_run(trees[1]), monkeypatch, 4)
    fit(read_resumed(tmp_path / "parts", {}), quiet(), resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "parts")


def test_a_checkpoint_holds_the_adapter_and_nothing_of_the_base(bases, data, tmp_path, monkeypatch):
    stopped(read_run(tree_of(bases, data, tmp_path / "out")), monkeypatch, 3)
    checkpoint, _ = find_checkpoint(tmp_path / "out")
    assert checkpoint.name == "checkpoint-3"
    assert not (checkpoint / "model.safetensors").exists()
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    assert tensors and all("mixora_" in name for name in tensors)


def test_checkpoints_on_the_way_go_unless_they_are_kept(bases, data, tmp_path):
    fit(read_run(tree_of(bases, data, tmp_path / "gone", save_every=5)), quiet())
    assert not (tmp_path / "gone" / "checkpoints").exists()
    fit(read_run(tree_of(bases, data, tmp_path / "kept", save_every=5, keep_checkpoints=True)), quiet())
    kept = {path.name for path in (tmp_path / "kept" / "checkpoints").iterdir()}
    assert kept == {"checkpoint-5", "checkpoint-10", "checkpoint-12"}


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "name", "told"),
    [
        (truncate, "optimizer.pt", r"optimizer.pt has [\d,]+ bytes of [\d,]+"),
        (flip, "adapter_model.safetensors", "adapter_model.safetensors is damaged: its checksum differs"),
        (flip, "rng_state.pth", "rng_state.pth is damaged: its checksum differs"),
        (Path.unlink, "trainer_state.json", "trainer_state.json is missing"),
        (Path.unlink, "manifest.json", "it has no manifest.json"),
        (truncate, "manifest.json", r"its manifest.json is damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over(damage, name, told, tmp_path):
    for step in (6, 8):
        folder = tmp_path / "checkpoints" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for file in ("adapter_model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"):
            (folder / file).write_bytes(os.urandom(1000))
        write_manifest(folder)
    assert find_checkpoint(tmp_path) == (folder, [])
    damage(folder / name)
    found, damaged = find_checkpoint(tmp_path)
    assert found.name == "checkpoint-6"
    assert re.fullmatch(rf"{folder} was passed over, since it is not whole: {told}.*", *damaged)


def test_a_run_goes_on_from_the_newest_whole_checkpoint(bases, data, tmp_path, monkeypatch):
    whole = fit(read_run(tree_of(bases, data, tmp_path / "whole", log_every=4)), quiet())
    stopped(read_run(tree_of(bases, data, tmp_path / "out", save_every=3, log_every=4)), monkeypatch, 8)
    flip(tmp_path / "out" / "checkpoints" / "checkpoint-8" / "optimizer.pt")
    stray = tmp_path / "out" / "checkpoints" / ASIDE / "checkpoint-9"
    stray.mkdir(parents=True)
    clear_leftovers(tmp_path / "out")
    assert not stray.parent.exists()
    resumed = fit(read_resumed(tmp_path / "out", {}), quiet(), resume=True)
    assert same_weights(tmp_path / "whole", tmp_path / "out")
    assert (resumed.history, resumed.after) == (whole.history, whole.after)
    assert any("checkpoint-8 was passed over" in note for note in resumed.notes)
    assert (whole.environment["interruptions"], resumed.environment["interruptions"]) == (0, 1)
    # and from step 0, where there is none
    stopped(read_run(tree_of(bases, data, tmp_path / "none", log_every=4)), monkeypatch, 2)
    (tmp_path / "none" / "checkpoints" / "checkpoint-2" / "trainer_state.json").unlink()
    resumed = fit(read_resumed(tmp_path / "none", {}), quiet(), resume=True)
    assert any("trainer_state.json is missing" in note for note in resumed.notes)
    assert same_weights(tmp_path / "whole", tmp_path / "none") and resumed.history == whole.history


def test_an_interruption_after_training_costs_no_training(bases, data, tmp_path, monkeypatch):
    whole = fit(read_run(tree_of(bases, data, tmp_path / "whole")), quiet())

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "_read_back", interrupt)
        with pytest.raises(StoppedError, match="after step 12 of 12"):
            fit(read_run(tree_of(bases, data, tmp_path / "out")), quiet())
    resumed = fit(read_resumed(tmp_path / "out", {}), quiet(), resume=True)
    assert (resumed.after, resumed.history) == (whole.after, whole.history)


def test_a_second_signal_stops_at_once(bases, data, tmp_path, monkeypatch):
    stop_at(monkeypatch, 3, times=2)
    with pytest.raises(KeyboardInterrupt):
        fit(read_run(tree_of(bases, data, tmp_path / "out")), quiet())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_says_how_to_go_on(tmp_path):
    with pytest.raises(UnwrittenError, match=r"(?s)is full; .*room:.mixora train --resume"), resumable(tmp_path):
        raise UnwrittenError(f"{tmp_path}: is full")


@pytest.mark.parametrize("keeps", [False, True])
def test_what_a_finished_run_had_not_removed_goes(keeps, tmp_path):
    for name in (MARK, "record.json", "start.json"):
        (tmp_path / name).touch()
    (tmp_path / "run.yaml").write_text(f"train: {{keep_checkpoints: {str(keeps).lower()}}}")
    (tmp_path / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    clear_leftovers(tmp_path)
    left = {MARK, "record.json", "run.yaml"} | ({"checkpoints"} if keeps else set())
    assert {path.name for path in tmp_path.iterdir()} == left


def test_where_a_run_is_at_work_no_other_one_writes(bases, data, tmp_path):
    out = tmp_path / "out"
    tree = tree_of(bases, data, out, steps=1)
    fit(read_run(tree), quiet())
    (out / ASIDE / "half").mkdir(parents=True)
    before = sorted(out.rglob("*"))
    with FolderLock(out) as lock:
        lock.take()
        for act in (
            lambda: clear_leftovers(out),
            lambda: fit(read_run(tree), quiet(), overwrite=True),
            lambda: fit(read_run(tree), quiet(), resume=True),
        ):
            with pytest.raises(ConfigError, match="is being written by another process"):
                act()
    assert sorted(out.rglob("*")) == before


def test_checkpoints_without_an_optimiser_are_refused(bases, data, tmp_path):
    config = read_run(tree_of(bases, data, tmp_path / "out", arguments={"save_only_model": True}))
    with pytest.raises(ConfigError, match=r"train\.arguments\.save_only_model: got True; valid: False"):
        make_arguments(config)


def test_changed_rows_and_another_base_are_refused(bases, data, tmp_path, monkeypatch):
    out, base = tmp_path / "out", tmp_path / "base"
    shutil.copytree(bases / "llama", base)
    tree = tree_of(bases, data, out)
    tree["model"]["base"] = str(base)
    stopped(read_run(tree), monkeypatch, 2)
    for path, change in [
        (data / "commands" / "train.jsonl", lambda text: text.replace("kitchen", "kitchem", 1)),
        (base / "config.json", lambda text: text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')),
    ]:
        path.write_text(change(path.read_text()))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    told = r"not the same; the base's configuration: rms_norm_eps; the base's weights; valid: the same rows"
    with pytest.raises(CheckpointError, match=r"as many \(32\), but " + told):
        fit(read_resumed(out, {}), quiet(), resume=True)


def test_the_command_goes_on(bases, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(read_run(tree_of(bases, data, out)), monkeypatch, 3)
    rehearsed = CliRunner().invoke(app, ["train", "--resume", str(out), "--dry-run"])
    assert f"goes on from {out}/checkpoints/checkpoint-3" in rehearsed.output.replace("\n", "")
    refused = CliRunner().invoke(app, ["train", "--resume", str(out), "--recipe", "lora"])
    assert refused.exit_code == 2 and "adapter.recipe: got 'lora'" in " ".join(refused.output.split())
    result = CliRunner().invoke(app, ["train", "--resume", str(out), "--json"])
    assert result.exit_code == 0 and len(json.loads(result.output)["history"]) == 12


@pytest.mark.slow
def test_ctrl_c_and_resume_on_the_command_line(bases, data, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-c", "import mixora_command; mixora_command.main()", "train"]
    words = ["--recipe", "sira", "--model", bases / "llama", "--data", data / "commands", "--out", out]
    small = ["adapter.num_experts=4", "adapter.rank=2", "train.steps=40000", "evaluate.limit=2", "train.save_every=5"]
    process = subprocess.Popen(
        [*map(str, command + words), *small, "evaluate.max_new_tokens=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    while not list(out.glob("checkpoints/*/trainer_state.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    told, errors = (text.decode() for text in process.communicate(timeout=60))
    assert process.returncode == 130
    assert f"mixora train --resume {out}" in errors and "of 40000, which is saved" in errors
    assert "\x1b" not in told + errors and "Traceback" not in errors
    assert find_checkpoint(out)[0]
