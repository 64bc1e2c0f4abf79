"""Runs that go on with other settings: which may change, and that they then hold."""

import json

import pytest

from mixora.errors import CheckpointError, ConfigError
from mixora.training.checkpoints import read_resumed
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.test_resuming import stopped, tree_of
from tests.training.test_run import quiet


def test_other_settings_are_refused_but_those_that_training_does_not_depend_on(bases, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="is not the folder of a run"):
        read_resumed(tmp_path, {})
    stopped(read_run(tree_of(bases, data, out)), monkeypatch, 2)
    for changes, message in [
        ({"train": {"learning_rate": 0.5}}, r"train\.learning_rate: got 0\.5, but .* was started with 0\.01"),
        ({"adapter": {"rank": 8}}, r"adapter\.rank: got 8, but .* was started with 2"),
        ({"adapter": {"alpha": 8}}, r"adapter\.alpha: got 8, but .* was started with None"),
        ({"out": "elsewhere"}, "out: got 'elsewhere'"),
    ]:
        with pytest.raises(ConfigError, match=message):
            read_resumed(out, changes)
    changed = read_resumed(out, {"evaluate": {"limit": 2}, "train": {"skip_bad_steps": 3}})
    fit(changed, quiet(), resume=True)
    assert json.loads((out / "record.json").read_text())["after"]["rows"] == 2
    with pytest.raises(CheckpointError, match="is finished"):
        read_resumed(out, {})


@pytest.mark.parametrize("started", [{}, {"save_every": 2, "log_every": 2}])
def test_a_resumed_run_saves_and_logs_as_often_as_it_is_told_now(started, bases, data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    stopped(read_run(tree_of(bases, data, out, **started)), monkeypatch, 3)
    now = {"save_every": 5, "log_every": 4, "keep_checkpoints": True}
    record = fit(read_resumed(out, {"train": now}), quiet(), resume=True)
    saved = {int(path.name.rpartition("-")[2]) for path in (out / "checkpoints").iterdir()}
    assert {step for step in saved if step > 3} == {5, 10, 12}
    assert [line["step"] for line in record.history if line["step"] > 3] == [4, 8, 12]
