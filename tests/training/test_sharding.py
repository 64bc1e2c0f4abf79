"""Sharded training equals that of one process; what was asked for and does not shard is refused."""

import json
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mixora
from benchmarks.reliability import sharding as program
from mixora.errors import CheckpointError, TrainingError
from mixora.passes.inputs import Input
from mixora.training.sharding import check_sharding
from tests.models import adapt, fill, gradients, tiny_llama, token_ids
from tests.training.setups import make_model, make_trainer
from tests.training.two_ranks_sharded import NO_BALANCE, STEPS


@pytest.mark.works_with(
    "distribution", "`fsdp` of `TrainingArguments` (FSDP2) on two ranks (gloo): losses and weights of one process"
)
def test_the_trainer_equals_one_process_and_saves_whole(two_ranks, tmp_path):
    folder, found = two_ranks["folder"] / "sharded", two_ranks["sharded"]
    trainer = make_trainer(
        mixora.Trainer, tmp_path, model=fill(make_model(**NO_BALANCE)), **{**STEPS, "per_device_train_batch_size": 8}
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    torch.testing.assert_close(found["losses"], torch.tensor(losses), rtol=0, atol=2e-6)
    state = trainer.model.state_dict()
    for name, value in found["weights"].items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=2e-5)
    read = mixora.from_pretrained(make_model().unload(), folder).state_dict()
    assert all(torch.equal(read[name], value) for name, value in found["weights"].items())


def test_an_adapter_loads_into_shards(two_ranks):
    assert two_ranks["sharded"]["loaded"]


def test_a_rank_without_tokens_keeps_up(two_ranks):
    assert max(two_ranks["sharded"]["idle"]) < 1e-7


def test_activation_checkpointing_and_mixed_precision(two_ranks):
    found = two_ranks["sharded"]
    assert found["checkpoints"] < 1e-7
    low, full = found["low"]
    torch.testing.assert_close(low, full, rtol=1e-2, atol=0)
    assert low != full
    assert found["low dtypes"] == ["torch.float32"]


def test_a_sharded_model_serves_as_a_whole_one(two_ranks):
    assert two_ranks["sharded"]["apart"] < 1e-6
    assert two_ranks["sharded"]["written"]


def test_what_does_not_shard_is_refused(two_ranks):
    assert two_ranks["sharded"]["version 1"].startswith(
        "FSDP was asked for, but after preparation the model is trained by DDP, whole on each process; valid: a launch "
        "in which it is sharded (FSDP2, version 2 of accelerate's settings)"
    )


def asking(model, processes=1, wrapped=None, **args):
    """The least of a trainer that the check looks at."""
    settings = {"deepspeed": None, "deepspeed_plugin": None, "fsdp_plugin_args": None, "parallelism_config": None}
    return SimpleNamespace(
        model_wrapped=wrapped or model,
        accelerator=SimpleNamespace(num_processes=processes, state=SimpleNamespace()),
        args=SimpleNamespace(**{**settings, **args}),
    )


@pytest.mark.parametrize(
    ("settings", "environment", "said"),
    [
        ({"fsdp_plugin_args": {"fsdp_version": 2}}, {}, "FSDP2 was asked for, .* trained by one process, whole"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "FSDP2 was asked for"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "FSDP was asked for"),
        ({"parallelism_config": SimpleNamespace(dp_shard_enabled=True)}, {}, "FSDP2 was asked for"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3), "deepspeed": {}}, {}, None),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3), "deepspeed": {"x": 1}}, {}, "ZeRO-3 was asked for"),
        (
            {"fsdp_plugin_args": {"fsdp_version": 2}},
            {"WORLD_SIZE": "2"},
            r"FSDP2 was asked for with 2 processes, .* same rows; valid on a CPU: TrainingArguments\(use_cpu=True\)",
        ),
        ({}, {"WORLD_SIZE": "2"}, None),
    ],
)
def test_what_was_asked_is_found(settings, environment, said, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    trainer = asking(nn.Linear(2, 2), **settings)
    if said is None:
        check_sharding(trainer)
    else:
        with pytest.raises(TrainingError, match=said):
            check_sharding(trainer)


def zero_engine(model, stage):
    engine = nn.Module()
    engine.module, engine.zero_optimization_stage = model, lambda: stage
    return engine


def test_adamix_under_zero_is_refused():
    model = adapt(tiny_llama(), mixora.recipe("adamix"))
    plugin = SimpleNamespace(zero_stage=2)
    trainer = asking(model, wrapped=zero_engine(model, 2), deepspeed={"a": 1}, deepspeed_plugin=plugin)
    with pytest.raises(TrainingError, match="would change experts that were not drawn; valid: FSDP2"):
        check_sharding(trainer)
    # the other recipes have nothing against it
    model = adapt(tiny_llama(), mixora.recipe("mola", num_experts=4))
    check_sharding(asking(model, wrapped=zero_engine(model, 2), deepspeed={"a": 1}, deepspeed_plugin=plugin))


def test_loading_behind_zeros_back_is_refused(tmp_path):
    model = adapt(tiny_llama(), mixora.recipe("mola", num_experts=4))
    model.save_pretrained(tmp_path)
    for parameter in model.parameters():
        # as DeepSpeed marks them
        parameter._hp_mapping = None
    with pytest.raises(CheckpointError, match="DeepSpeed's optimiser holds copies of and writes back in"):
        model.load_adapter(tmp_path, "default")


@pytest.mark.parametrize("kernel", ["loop", "sorted", "stacked", "joint"])
@pytest.mark.parametrize("recipe", ["mola", "adamoe", "adamole", "mixlora", "pesc"])
def test_without_a_token_every_expert_has_a_gradient(recipe, kernel):
    """Else ranks would disagree on what they reduce, and wait for each other."""
    if recipe in ("mixlora", "pesc") and kernel == "joint":
        pytest.skip("joint computes LoRA experts beside linear modules")
    config = mixora.recipe(recipe, kernel=kernel, rank=2, **({"num_experts": 4} if recipe == "mola" else {}))
    model, ids = adapt(tiny_llama(), config), token_ids(2, 6)
    positions = torch.arange(6).expand(2, 6)
    model(input_ids=ids, attention_mask=ids * 0, position_ids=positions, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def check_program(folder, *options):
    """Run the program of the page on reliability, small, and look at each of its rows."""
    found = json.loads(program.run(["--quick", "--out", str(folder), *options]).read_text())
    for row in found["rows"]:
        assert row["processes"] == 2
        assert row["held"] <= 0.6 * row["whole"]
        assert row["losses"] < 2e-6
        assert row["weights"] < 2e-5
        assert row["saved"]
        assert row["loaded"]
    return {(row["recipe"], row["way"]) for row in found["rows"]}


@pytest.mark.slow
def test_recipes_under_fsdp2(tmp_path):
    assert check_program(tmp_path, "--ways", "fsdp2") == {(recipe, "fsdp2") for recipe in program.QUICK}


@pytest.mark.works_with("distribution", "DeepSpeed's ZeRO-2 and ZeRO-3 on two ranks: losses and weights of one process")
@pytest.mark.slow
def test_recipes_under_zero(tmp_path):
    if find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed, which is not installed")
    found = check_program(tmp_path, "--ways", "zero2", "zero3", "--recipes", "sira", "pesc")
    assert found == {(recipe, way) for recipe in ("sira", "pesc") for way in ("zero2", "zero3")}


class Identity(torch.autograd.Function):
    """What ZeRO-3 puts before each module: the same numbers in the same place, as a tensor of its own."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


@pytest.mark.parametrize("recipe", ["mixlora", "sira", "pesc"])
def test_identities_before_each_module_change_nothing(recipe):
    def step():
        model = adapt(tiny_llama(), mixora.recipe(recipe, rank=2))
        for module in model.modules() if wraps else ():
            module.register_forward_pre_hook(lambda _, args: tuple(map(wrap, args)))
        model.eval()
        loss = model(input_ids=token_ids(2, 6), labels=token_ids(2, 6)).loss
        loss.backward()
        return {"loss": loss.detach(), **gradients(model)}

    def wrap(x):
        return Identity.apply(x) if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    wraps = False
    want = step()
    wraps = True
    found = step()
    assert found.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_is_detached_is_another_input():
    x = torch.randn(3, 4, requires_grad=True)
    made_from = Input.of(x, wrapped=True)
    assert made_from.is_now(Identity.apply(x))
    assert not made_from.is_now(x.detach())
    assert not made_from.is_now(x.clone())
    assert not made_from.is_now(x[:2])
    assert not Input.of(x).is_now(Identity.apply(x))
    with torch.no_grad():
        x.add_(1)
    assert not made_from.is_now(x)
