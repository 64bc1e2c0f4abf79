"""What a step takes on paper: against published figures, closed forms, and what real steps allocate."""

import json
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

import mixora
from benchmarks.reliability.footprint import Case, compare, measure
from mixora.bases import sketch_base
from mixora.cli import app
from mixora.commands.methods import _write_size
from mixora.errors import ConfigError
from mixora.footprint import STRATEGIES, Traffic, count_base, estimate
from mixora.footprint.live import LiveBytes
from mixora.footprint.step import run_step
from mixora.footprint.units import split_into_units
from mixora.training.planning import LOSSES, plan_without_weights
from tests.models import tiny_aria, tiny_gemma4_moe, tiny_hunyuan_moe, tiny_llama, tiny_mixtral, tiny_qwen3_moe

EXAMPLES = Path(__file__).parents[2] / "examples" / "scale"
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


def sketch(recipe="lora", **changes):
    with torch.device("meta"):
        return get_peft_model(tiny_llama(**changes), mixora.recipe(recipe))


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("llama-2-7b", 6.738e9, 6.738e9), ("llama-3-70b", 70.55e9, 70.55e9), ("moe-1t", 1.03e12, 32.6e9)],
)
def test_parameters_are_the_published_ones(name, total, active):
    found = count_base(sketch_base(EXAMPLES / name, dtype="bfloat16"))
    assert found == (pytest.approx(total, rel=0.005), pytest.approx(active, rel=0.03))


@pytest.mark.parametrize("make", [tiny_mixtral, tiny_qwen3_moe, tiny_gemma4_moe, tiny_hunyuan_moe, tiny_aria])
def test_active_experts_are_those_that_one_token_reaches(make):
    model = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model(input_ids=torch.tensor([[5]])).logits.square().sum().backward()
    stacks = [p for name, p in model.named_parameters() if "experts" in name and p.dim() == 3]
    unreached = sum(int((p.grad.flatten(1) == 0).all(1).sum()) * p[0].numel() for p in stacks)
    total, active = count_base(model)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - active == unreached > 0


@pytest.mark.parametrize(
    "case",
    [Case("sira"), Case("mola", recomputes=True), Case("lora", dtype="bfloat16", fused=False)],
    ids=lambda case: f"{case.recipe}-{case.dtype}",
)
def test_memory_is_what_a_step_allocates(case):
    assert abs(compare(case, 1, measure(case))["error"]) < 0.1


def test_rings_send_what_they_must():
    assert Traffic.of(4, all_reduce=800) == Traffic(all_reduce=1200)
    assert Traffic.of(4, gather_forward=800, reduce_scatter=400).total == 600 + 300


def test_what_each_strategy_keeps_and_sends():
    """The tiny Llama in fp32: LoRA of rank 16 on q and o (32 -> 32), k and v (32 -> 16), two layers."""
    model = sketch()
    trained = 4 * 2 * 16 * (2 * 64 + 2 * 48)
    frozen = sum(p.nbytes for p in model.parameters()) - trained
    found = {f.strategy: f for f in estimate(model, 2, 8, LOSSES, list(STRATEGIES.values()), 2)}
    ddp, fsdp2 = found["ddp"], found["fsdp2"]
    assert (ddp.memory.base_weights, ddp.memory.adapter_weights, ddp.memory.optimiser) == (frozen, trained, 2 * trained)
    assert ddp.traffic == Traffic(all_reduce=trained)
    assert (fsdp2.memory.base_weights, fsdp2.memory.gradients) == (frozen // 2, trained // 2)
    # embedding, norm and head stay gathered
    root = 4 * (2 * 64 * 32 + 32)
    whole = frozen + trained
    assert fsdp2.traffic == Traffic(0, whole // 2, (whole - root) // 2, trained // 2)


def test_under_zero3_nothing_is_made_again():
    """Its hooks hide from autograd's graph what made a tensor: act(gate) is kept, beside gate and `up`."""
    model, tokens, width = sketch(intermediate_size=4096), 2 * 8, 4096
    found = {f.strategy: f.memory for f in estimate(model, 2, 8, LOSSES, [STRATEGIES["fsdp2"], STRATEGIES["zero3"]], 2)}
    layers = model.config.num_hidden_layers
    assert found["zero3"].activations - found["fsdp2"].activations == pytest.approx(
        layers * tokens * width * 4, rel=1e-3
    )


def test_rows_that_do_not_divide_are_filled_up():
    model = sketch()
    by_three = estimate(model, 2, 8, LOSSES, [STRATEGIES["fsdp2"]], 3)[0].memory.base_weights
    shards = [-(-len(p) // 3) * p.nbytes // len(p) for p in model.parameters() if not p.requires_grad]
    assert by_three == sum(shards)


def test_work_does_not_grow_with_depth_or_width(monkeypatch):
    calls = []
    own = LiveBytes.__torch_dispatch__

    def count(self, func, *given):
        calls.append(func)
        return own(self, func, *given)

    monkeypatch.setattr(LiveBytes, "__torch_dispatch__", count)

    def work(**changes):
        calls.clear()
        estimate(sketch("sira", **changes), 2, 8, LOSSES)
        return len(calls)

    shallow = work(layers=6)
    # what is left is the loss of each site's routing and its backward
    assert (work(layers=12) - shallow) / 6 < shallow / 6 / 4
    assert abs(work(layers=6, intermediate_size=4096) - shallow) < 20


@pytest.mark.parametrize(
    ("recipe", "layers", "recomputes"),
    [
        ("sira", 6, True),
        ("hilo", 20, False),
        ("pesc", 6, False),
        ("mixlora", 6, True),
        ("adamix", 6, False),
    ],
)
def test_blocks_left_out_are_counted_as_if_they_had_run(recipe, layers, recomputes):
    model = sketch(recipe, layers=layers)
    if recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    units = split_into_units(model)
    ids = torch.zeros(2, 8, dtype=torch.long, device="meta")

    def run(whole):
        return run_step(model, units, {"input_ids": ids, "labels": ids}, LOSSES[True], whole=whole)

    # the first one makes what the process keeps for all that follow
    run(False)
    short, whole = run(False), run(True)
    assert short.kept == whole.kept and short.moments.keys() == whole.moments.keys()
    # which of AdaMix's experts are drawn, and get a gradient, is chance: each pass of a block at most one expert's
    slack = 2 * layers * units[1].trained[0].nbytes if recipe == "adamix" else 0
    for key, moment in whole.moments.items():
        assert abs(short.moments[key].live - moment.live) <= slack
        assert abs(short.moments[key].with_gradients - moment.with_gradients) <= slack


def test_a_base_without_cache_has_a_plan(tmp_path):
    tiny_llama(use_cache=False).config.save_pretrained(tmp_path)
    tree = {"model": {"base": str(tmp_path)}, "adapter": {"recipe": "lora"}}
    assert plan_without_weights(tree, 2, 8).footprints[0].memory.peak > 0


def test_plan_for_processes():
    words = ["--recipe", "lora", "--model", str(EXAMPLES / "llama-2-7b"), "model.dtype=bfloat16", "--processes", "8"]
    words += ["--batch", "1", "--length", "64", "--json"]
    found = json.loads(CliRunner().invoke(app, ["plan", *words]).output)
    by_name = {footprint["strategy"]: footprint for footprint in found["footprints"]}
    assert by_name.keys() == STRATEGIES.keys()
    assert by_name["ddp"]["memory"]["base_weights"] == 2 * 6738415616
    assert by_name["fsdp2"]["memory"]["base_weights"] == pytest.approx(2 * 6738415616 / 8, rel=1e-3)
    assert found["parameters"]["base"] == 6738415616


def test_recomputation_takes_less():
    tree = {"model": {"base": str(EXAMPLES / "llama-2-7b"), "dtype": "bfloat16"}, "adapter": {"recipe": "lora"}}
    plain, lean = (plan_without_weights(tree, 1, 256, recomputes=r).footprints[0].memory for r in (False, True))
    assert lean.activations < plain.activations / 5


def test_mistakes_about_processes():
    tree = {"model": {"base": str(EXAMPLES / "llama-2-7b")}}
    with pytest.raises(ConfigError, match="strategy: got ddp for one process; valid: with processes=2 or more"):
        plan_without_weights(tree, 1, 8, strategies=["ddp"])
    with pytest.raises(ConfigError, match="strategy: got 'fsdp'; did you mean 'fsdp2'"):
        plan_without_weights(tree, 1, 8, processes=2, strategies=["fsdp"])


def test_rows_longer_than_the_base_takes_are_a_mistake():
    with pytest.raises(ConfigError, match=r"length: got 5000; valid for .*llama-2-7b: at most 4096 tokens"):
        plan_without_weights({"model": {"base": str(EXAMPLES / "llama-2-7b")}}, 1, 5000)


def test_strategies_may_be_picked():
    tree = {"model": {"base": str(EXAMPLES / "llama-2-7b")}, "adapter": {"recipe": "lora"}}
    found = plan_without_weights(tree, 1, 8, processes=2, strategies=["fsdp2", "ddp"])
    assert [each.strategy for each in found.footprints] == ["ddp", "fsdp2"]


@pytest.mark.parametrize(
    ("number", "text"), [(None, "\N{EN DASH}"), (0, "0.0"), (1536, "1.5"), (1024 * 1234.5, "1,234")]
)
def test_sizes_in_a_table(number, text):
    assert _write_size(number, 1024) == text
