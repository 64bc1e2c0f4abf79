"""What the program on processes makes of what its processes found; they themselves run in tests/training."""

import json

import pytest
import torch

from benchmarks.reliability import processes

CASES = ("lora", "sira")


def found_by(world, losses, weight):
    facts = {"losses": losses, "moved": 0.5, "idle": 3, "balance": []}
    weights = {f"{name}/A": torch.tensor([1.0, weight]) for name in CASES}
    return {"world": world, "cases": dict.fromkeys(CASES, facts), "weights": weights, "tokens_per_second": {}}


def test_differences_are_the_largest_ones(tmp_path, monkeypatch):
    found = {1: found_by(1, [2.0, 4.0], 2.0), 2: found_by(2, [2.0, 4.1], 1.75)}
    monkeypatch.setattr(processes, "list_cases", lambda quick: dict.fromkeys(CASES))
    monkeypatch.setattr(processes, "run_world", lambda world, *_: found[world])
    path = processes.main(["--quick", "--out", str(tmp_path)])
    (row, other) = json.loads(path.read_text())["rows"]
    assert (row["case"], other["case"], row["processes"]) == (*CASES, 2)
    assert row["loss"] == pytest.approx(0.025)
    assert (row["weights"], row["moved"], row["without_tokens"]) == (0.25, 0.5, 3)
