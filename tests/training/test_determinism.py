"""Deterministic mode: what it sets and sets back, what it refuses, and that a run uses it."""

import os

import pytest
import torch

from mixora.errors import TrainingError
from mixora.training import run as running
from mixora.training.determinism import DETERMINISTIC_WORKSPACE, WORKSPACE, deterministic
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.test_run import quiet, settings


@pytest.mark.parametrize("own", [None, ":16:8"])
def test_what_was_set_before_is_set_again(own, monkeypatch):
    monkeypatch.delenv(WORKSPACE, raising=False)
    if own is not None:
        monkeypatch.setenv(WORKSPACE, own)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.raises(ValueError, match="own"), deterministic():
        assert torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
        assert os.environ[WORKSPACE] == own or DETERMINISTIC_WORKSPACE
        raise ValueError("own")
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert os.environ.get(WORKSPACE) == own
    with deterministic():
        pass
    assert os.environ.get(WORKSPACE) == own
    with deterministic(is_on=False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_an_operator_without_a_deterministic_version_is_named():
    # one of those that have none on a CPU either
    with (
        pytest.raises(TrainingError, match=r"operator put_\S* has no deterministic version") as caught,
        deterministic(),
    ):
        torch.zeros(3).put_(torch.tensor([0]), torch.ones(1), accumulate=False)
    assert "train.deterministic=false" in str(caught.value)
    with pytest.raises(TrainingError, match="cuBLAS has started with another workspace"), deterministic():
        raise RuntimeError("Deterministic behavior was enabled ... CuBLAS ... set CUBLAS_WORKSPACE_CONFIG=:4096:8")
    with pytest.raises(RuntimeError, match="something else"), deterministic():
        raise RuntimeError("something else")


@pytest.mark.parametrize("is_on", [False, True])
def test_a_run_uses_it(is_on, bases, data, tmp_path, monkeypatch):
    seen = []

    def stop(*given):
        seen.append(torch.are_deterministic_algorithms_enabled())
        raise ValueError("seen enough")

    monkeypatch.setattr(running, "make_trainer", stop)
    tree = settings(bases / "llama", data / "commands", tmp_path / "out", train__deterministic=is_on)
    with pytest.raises(ValueError, match="seen enough"):
        fit(read_run(tree), quiet())
    assert seen == [is_on] and not torch.are_deterministic_algorithms_enabled()
