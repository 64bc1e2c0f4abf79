"""Every benchmark runs, at sizes where that takes a second, and leaves figures and a plot."""

import argparse
import importlib
import json

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks import BENCHMARKS, kernels, layers, measuring, running, scaling, serving, training_step
from benchmarks.kernels import Case

FACTS = {"date", "command", "machine", "load", "versions"}
TINY = {
    "step": ["--layers", "1", "--repeats", "2", "--dtype", "float32"],
    "memory": ["--layers", "1", "--repeats", "1", "--dtype", "float32"],
    "decode": ["--layers", "1", "--repeats", "2", "--dtype", "float32", "--batch", "1", "2"],
    "serving": ["--layers", "1", "--repeats", "2", "--dtype", "float32"],
    "layers": ["--layers", "1", "--repeats", "1"],
    "scaling": ["--repeats", "1", "--dtype", "float32"],
    "loss": ["--repeats", "1", "--width", "8", "--vocabulary", "512", "--tokens", "64"],
    "kernels": ["--repeats", "1", "--tokens", "300"],
}


def make_case(width, dtype, rank, **more):
    return Case(min(width, 32), dtype, rank, **{"tokens": 12, **more})


@pytest.fixture
def small(monkeypatch):
    for name, size in {"ROWS": 2, "LENGTH": 4, "VOCABULARY": 64}.items():
        monkeypatch.setattr(training_step, name, size)
    for name, size in {"WIDTH": 32, "INNER": 24, "TOKENS": 12}.items():
        monkeypatch.setattr(layers, name, size)
    for name, sizes in {"EXPERTS": (8, 16), "TOKENS": (6, 12), "Case": make_case}.items():
        monkeypatch.setattr(scaling, name, sizes)
    for name, sizes in {"WIDTHS": (16, 32), "RANKS": (4, 8), "Case": make_case}.items():
        monkeypatch.setattr(kernels, name, sizes)
    # takes longer than all else here
    monkeypatch.setattr(measuring.gc, "collect", lambda: 0)
    # at such sizes there is nothing to find
    monkeypatch.setattr(kernels, "find_limits", lambda rows: {"float32": 24, "bfloat16": 24})


@pytest.fixture
def run(small, tmp_path):
    def run(name):
        path = running.run(name, [*TINY[name], "--out", str(tmp_path)])
        assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        return json.loads(path.read_text())

    return run


def test_all_but_the_peers_are_tried_here():
    assert {*TINY, "peers"} == set(BENCHMARKS)


@pytest.mark.parametrize("name", [name for name in TINY if name != "kernels"])
def test_a_benchmark_gives_paired_ratios_with_their_spread(name, run):
    found = run(name)
    assert set(found) >= FACTS
    assert found["command"].startswith(f"mixora bench {name} --")
    assert set(found["versions"]) == {"python", "torch", "transformers", "peft", "mixora"}
    ratio = "memory_ratio" if name == "memory" else "ratio"
    for row in found["rows"]:
        low, high = row[f"{ratio}_quartiles"]
        assert 0 < low <= row[ratio] <= high
    assert sum(row[ratio] == 1 for row in found["rows"]) >= 1


def test_kernels_give_limits_speed_and_growth(run):
    found = run("kernels")
    assert set(found) >= {*FACTS, "limits", "speed", "growth"}
    for row in found["speed"]:
        assert row["ratio"]["sorted"] == 1
        assert set(row["ratio"]) == set(row["ms"]) == set(row["ratio_quartiles"])


def test_serving_compares_what_is_to_cost_nothing(small):
    compared = serving.make_models(1, torch.float32)
    assert set(compared["merged / one LoRA"]) == {
        "PEFT LoRA r=4",
        "AdaMix, merged to a LoRA",
        "AdaMix, evaluation mode",
    }
    folded = compared["folded / base"]
    assert next(iter(folded)) == "frozen base"
    assert {type(model) for model in folded.values()} == {LlamaForCausalLM}


def test_growth_is_over_experts_tokens_and_load():
    series = scaling.list_series("float32", 8192)
    assert {grows for grows, _ in series} == {"experts", "tokens", "load"}
    assert [case.tokens for case in series["tokens", "rank 8"].values()] == [256, 512, 1024, 2048, 4096, 8192]
    assert [case.skewed for case in series["load", "rank 32"].values()] == [False, True]
    assert {case.experts * case.rank for case in series["experts", "R 512"].values()} == {512}


def test_an_unknown_option_ends_with_code_2(capsys):
    with pytest.raises(SystemExit) as ended:
        running.run("step", ["--nothing"])
    assert ended.value.code == 2
    assert "mixora bench step" in capsys.readouterr().err


def test_modules_have_what_the_table_promises():
    for name, benchmark in BENCHMARKS.items():
        module = importlib.import_module(f"benchmarks.{benchmark.module}")
        options = running.read_options(name, module, [])
        assert isinstance(options, argparse.Namespace) and options.out.name == "results"
        assert callable(module.measure_all) and callable(module.draw)
