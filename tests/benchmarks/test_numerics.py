"""What the program on numbers that go wrong makes of what it finds; whole runs are left to it."""

import json

import torch
from safetensors.torch import save_file

import mixora
from benchmarks.reliability import number_cases as cases
from benchmarks.reliability import numerics


def test_a_place_is_judged(tmp_path):
    case = "router, NaN"
    said, model, poison = cases.run_trainer(mixora.Trainer, "sira", case, tmp_path)
    found = cases.judge(case, said, model, poison)
    assert (found["is_named"], found["is_unchanged"]) == (True, True)
    assert not cases.judge("expert, NaN", said, model, poison)["is_named"]
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(1)
    assert not cases.judge(case, said, model, poison)["is_unchanged"]


def write_run(folder, weight, loss, created):
    (folder / "sira" / "adapter").mkdir(parents=True)
    save_file({"A": torch.tensor([1.0, weight])}, folder / "sira" / "adapter" / "adapter_model.safetensors")
    record = {"history": [{"loss": loss}], "created": created, "command": [], "environment": {}}
    (folder / "sira" / "record.json").write_text(json.dumps(record))
    return folder


def test_runs_are_compared_but_for_their_moment(tmp_path):
    one, same, other = (
        write_run(tmp_path / name, *facts)
        for name, facts in {"one": (2.0, 4.0, "now"), "same": (2.0, 4.0, "then"), "other": (2.5, 4.1, "now")}.items()
    )
    equal = {"weights": True, "losses": True, "record": True, "largest_difference": 0.0}
    assert numerics.compare("sira", one, same) == equal
    assert numerics.compare("sira", one, other) == dict.fromkeys(equal, False) | {"largest_difference": 0.5}
