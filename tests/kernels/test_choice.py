"""What `auto` stands for, where the limits come from, and how a plan tells it."""

import json
from pathlib import Path

import pytest
import torch

import mixora.kernels
from benchmarks.kernels import find_limits
from benchmarks.recording import RESULTS
from mixora.contracts import Shape
from mixora.errors import ConfigError
from mixora.kernels import KERNELS
from mixora.kernels.choice import STACKED_UP_TO, Choice, Served
from tests.models import OneLinear, adapt, tiny_llama, token_ids

FP32 = STACKED_UP_TO["cpu"]["float32"]


@pytest.fixture(params=["cpu", "amx"])
def kind(request, monkeypatch):
    """Of the processor, as torch tells it."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": request.param == "amx"})
    return request.param


def newest_result(kind: str) -> dict:
    """Of such a processor, by the date inside, then by name."""
    results = [(json.loads(path.read_text()), path.name) for path in Path(RESULTS).glob("kernels-*.json")]
    of_kind = [found for found in results if ("amx_bf16" in found[0]["machine"]) == (kind == "amx")]
    return max(of_kind, key=lambda found: (found[0]["date"], found[1]))[0]


def test_the_limits_on_a_cpu_are_those_of_the_newest_measurement(kind):
    found = newest_result(kind)
    assert found["limits"] == find_limits(found["speed"]) == STACKED_UP_TO[kind]


def rows(dtype, **ratios):
    """As measured: `stacked` takes that many times as long as `sorted` at R / K of x16, x64, ..."""
    return [
        {"dtype": dtype, "breadth": float(name[1:]), "ms": {"stacked": ratio, "sorted": 1.0}}
        for name, ratio in ratios.items()
    ]


def test_the_limit_lies_where_the_ratio_crosses_one():
    """Halfway between 16 and 256 on a logarithmic scale; and a third of the way from 16 to 1024."""
    measured = rows("float32", x16=0.5, x256=2.0, x512=4.0) + rows("bfloat16", x16=0.5, x1024=4.0)
    assert find_limits(measured) == {"float32": 64, "bfloat16": 64}


def test_the_last_crossing_counts_and_the_mean_over_widths():
    noisy = rows("float32", x8=1.1, x16=0.25, x256=2.0) + rows("float32", x8=1.1, x16=1.0, x256=2.0)
    assert find_limits(noisy + rows("bfloat16", x8=0.5, x32=2.0)) == {"float32": 64, "bfloat16": 16}


def test_no_crossing_is_no_limit():
    with pytest.raises(ValueError, match="do not cross"):
        find_limits(rows("float32", x16=0.5, x64=0.9) + rows("bfloat16", x16=0.5, x64=2.0))


@pytest.mark.parametrize(
    ("ranks", "top_k", "kernel"),
    [
        ((FP32 // 4,) * 8, 2, "stacked"),  # R / K is the limit
        ((FP32 // 4 + 1,) * 8, 2, "sorted"),
        ((FP32 // 4 + 1,) + (FP32 // 4,) * 7, 2, "sorted"),
        ((64 * FP32,), 1, "stacked"),  # one expert: nothing is computed in vain
        ((64 * FP32,) * 3, 3, "stacked"),
        ((64 * FP32,) * 3, 2, "sorted"),
    ],
)
def test_auto(ranks, top_k, kernel):
    assert Choice(torch.float32, FP32).settle("auto", Shape(8, 8, ranks), top_k, "here") == kernel


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("dtype", "row"),
    [
        (torch.float32, "float32"),
        (torch.float64, "float32"),
        (torch.bfloat16, "bfloat16"),
        (torch.float16, "bfloat16"),
    ],
)
def test_the_limit_follows_the_dtype_of_the_model_and_the_processor(monkeypatch, kind, device, dtype, row):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Choice.on(torch.nn.Linear(2, 2, dtype=dtype, device=device)).limit == STACKED_UP_TO[kind][row]


def test_the_meta_device_stands_for_cuda_where_there_is_any(monkeypatch, kind):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Choice.on(torch.nn.Linear(2, 2, device="meta")).limit == STACKED_UP_TO["cuda"]["float32"]
    assert Choice.on(torch.nn.Linear(2, 2)).limit == STACKED_UP_TO[kind]["float32"]


def test_reasons():
    def served(kernel, rank, experts, top_k, is_named=False):
        return Served(kernel, Shape(8, 8, (rank,) * experts), top_k, is_named)

    sites = [served("stacked", 4, 8, 2), served("stacked", 1, 8, 2), served("stacked", 64, 1, 1)]
    sites += [served("sorted", 512, 8, 2), served("loop", 8, 4, 2, is_named=True)]
    assert Choice(torch.float32, 48).explain(sites) == (
        "loop (named by a rule)",
        "stacked (R/K 4-16 ≤ 48, all experts in use)",
        "sorted (R/K 2048 > 48)",
    )
    assert Choice(torch.float32, 48).explain([served("stacked", 12, 8, 2)]) == ("stacked (R/K 48 ≤ 48)",)


def test_the_package_offers_what_it_names():
    assert mixora.kernels.__all__ == ["KERNELS", *sorted(kernel.__name__ for kernel in KERNELS.values())]
    assert {kernel.__name__.lower(): kernel for kernel in KERNELS.values()} == KERNELS


def test_a_plan_tells_its_kernels_with_the_reasons():
    text = " ".join(str(mixora.plan(tiny_llama(), mixora.recipe("pesc"))).split())
    limit = Choice.on(tiny_llama()).limit
    assert f"kernel: joint (all experts in use), sorted (R/K 2048 > {limit})" in text
    named = mixora.plan(tiny_llama(), mixora.recipe("sira", kernel="grouped", rank=8))
    assert named.kernels == ("grouped (named by a rule)",)
    low = mixora.plan(tiny_llama().bfloat16(), mixora.recipe("lora"))
    assert low.kernels == ("joint (all experts in use, router outputs in bfloat16)",)


def test_one_expert_for_a_whole_pass_is_all_there_is():
    plan = mixora.plan(tiny_llama(), mixora.recipe("adamix", rank=2000))
    assert plan.kernels == ("stacked (all experts in use)",)


def grouped(**changes):
    return mixora.recipe("sira", **{"num_experts": 4, "top_k": 2, "rank": 8, "kernel": "grouped", **changes})


def test_grouped_with_odd_ranks_is_refused():
    with pytest.raises(ConfigError, match=r"rules\.attention\.kernel, .*'grouped' needs multiples of 8, got rank 6"):
        mixora.plan(tiny_llama(), grouped(rank=6))


def test_grouped_with_odd_widths_is_refused():
    message = r"needs multiples of 8, got input width 6, output width 5; valid here: auto, loop, stacked, joint, sorted"
    with pytest.raises(ConfigError, match=message):
        mixora.plan(OneLinear(6, 5), grouped(targets=["proj"]))


def test_grouped_in_float64_is_refused():
    with pytest.raises(ConfigError, match=r"'grouped' cannot compute in torch\.float64; valid: torch\.float32"):
        mixora.plan(tiny_llama().double(), grouped())


def test_grouped_with_unequal_ranks_is_refused():
    config = grouped(targets=["q_proj"])
    ranks = {site.path: (8, 8, 16, 8) for site in mixora.plan(tiny_llama(), config).sites}
    config = mixora.MixoraConfig(rules=config.rules, losses=config.losses, allocation=ranks)
    with pytest.raises(ConfigError, match=r"'grouped' needs experts of one rank, got \[8, 8, 16, 8\]"):
        mixora.plan(tiny_llama(), config)


@pytest.mark.parametrize(
    "kernel", [n for n, k in KERNELS.items() if k.objection(Shape(8, 8, (8,)), torch.float32) is None]
)
def test_an_adapter_trained_with_any_kernel_loads_where_that_cannot_serve(tmp_path, kernel):
    model = adapt(tiny_llama(), grouped(kernel=kernel, capacity_factor=None)).eval()
    ids = token_ids(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    again = mixora.from_pretrained(tiny_llama().double(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits.float(), expected, rtol=1e-4, atol=1e-4)
