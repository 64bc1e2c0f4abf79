"""The PEFT face: what is trainable, plain LoRA as PEFT's, merging, unloading, several adapters, copies."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mixora
from mixora.errors import MixoraError
from mixora.mixture import Mixture
from tests.models import adapt, fill, gradients, tiny_bert, tiny_gpt2, tiny_llama, token_ids

IDS = token_ids(2, 8)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def sira(**changes):
    return mixora.recipe("sira", **{"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.0, **changes})


def lora(**changes):
    return mixora.recipe("lora", **changes)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def test_only_the_adapter_is_trainable():
    model = adapt(tiny_llama(), sira())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in model.named_parameters() if "mixora_" in name}
    assert len(trainable) == 8 * 3
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert gradients(model).keys() == trainable


def peft_twin(make, targets):
    """mixora's `lora` and PEFT's LoRA with the same weights."""
    ours = adapt(make(), lora(targets=targets, rank=16, alpha=32))
    settings = {"r": 16, "lora_alpha": 32, "target_modules": targets, "fan_in_fan_out": make is tiny_gpt2}
    theirs = get_peft_model(make(), LoraConfig(**settings)).train()
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if hasattr(module, "lora_A"):
                same = ours.get_submodule(name)
                module.lora_A["default"].weight.copy_(same.mixora_A["default"])
                module.lora_B["default"].weight.copy_(same.mixora_B["default"].T)
    return ours, theirs


@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, ATTENTION), (tiny_gpt2, ["c_attn", "c_proj", "c_fc"])])
def test_lora_is_what_peft_computes(make, targets):
    ours, theirs = peft_twin(make, targets)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    found, expected = ([m(input_ids=IDS, labels=IDS).loss.backward(), gradients(m)][1] for m in (ours, theirs))
    assert len(found) == len(expected)
    for name, gradient in found.items():
        twin = name.replace("mixora_A.default", "lora_A.default.weight").replace(
            "mixora_B.default", "lora_B.default.weight"
        )
        want = expected[twin].T if "mixora_B" in name else expected[twin]
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)


BASES = [
    (tiny_llama, ["all-linear"]),
    (tiny_bert, ["all-linear"]),
    (tiny_gpt2, ["c_attn", "mlp.c_proj", "c_fc"]),
    (tiny_gpt2, ["attn.c_proj"]),
]


@pytest.mark.parametrize(("make", "targets"), BASES)
def test_merged_lora_computes_the_same_and_unmerging_restores(make, targets):
    model = adapt(make(), lora(targets=targets)).eval()
    expected, plain = logits(model), logits(make().eval())
    assert not torch.allclose(expected, plain, atol=1e-2)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), plain, rtol=1e-5, atol=1e-5)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, Mixture) for module in merged.modules())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)


def test_disabling_a_merged_adapter_gives_the_base():
    model = adapt(tiny_llama(), lora()).eval()
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(tiny_llama().eval()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


def weights(model):
    return {n.replace(".base_layer", ""): p.clone() for n, p in model.named_parameters() if "mixora" not in n}


def assert_refuses_to_merge(model, merge, message="its router chooses experts by the input"):
    before = weights(model)
    with pytest.raises(MixoraError, match=message):
        merge()
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_merging_a_routed_mixture_is_refused_untouched(method):
    model = adapt(tiny_llama(), sira())
    assert_refuses_to_merge(model, getattr(model, method))
    assert logits(model).shape == (2, 8, 64)


@pytest.mark.parametrize("method", ["merge_adapter", "merge_and_unload"])
def test_a_routed_adapter_among_those_named_is_refused_untouched(method):
    model = adapt(tiny_llama(), lora(), adapter_name="plain")
    model.add_adapter("routed", sira())
    assert_refuses_to_merge(model, lambda: getattr(model, method)(adapter_names=["plain", "routed"]))


def test_weights_that_are_not_finite_are_not_merged_safely():
    model = adapt(tiny_llama(), lora())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "mixora_B" in n).fill_(torch.inf)
    with pytest.raises(MixoraError, match="not finite"):
        model.merge_adapter(safe_merge=True)


@pytest.mark.parametrize("config", [sira(), lora()])
def test_unloading_gives_the_untouched_base(config):
    plain, model = tiny_llama(), adapt(tiny_llama(), config)
    base = model.get_base_model()
    assert base._forward_pre_hooks
    unloaded = model.unload()
    assert unloaded is base
    assert not unloaded._forward_pre_hooks
    assert not unloaded.model._forward_hooks
    assert [n for n, _ in unloaded.named_modules()] == [n for n, _ in plain.named_modules()]
    assert torch.equal(logits(unloaded), logits(plain))


def two_adapters():
    model = adapt(tiny_llama(), sira(), adapter_name="one")
    model.add_adapter("two", sira(num_experts=3, targets=["q_proj", "down_proj"], rank=5))
    return fill(model, seed=9).eval()


def test_adapters_are_switched_disabled_and_deleted():
    model = two_adapters()
    plain = logits(tiny_llama().eval())
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    assert not torch.allclose(one, two, atol=1e-3)
    with model.disable_adapter():
        assert torch.equal(logits(model), plain)
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.endswith(".two"))
    model.set_adapter("two")
    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    assert torch.equal(logits(model), two)
    assert not any(n.endswith(".one") for n, _ in model.named_parameters())


def test_two_active_adapters_add_up():
    model = two_adapters()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(2, 3, 32)
    deltas = []
    for name in ("one", "two"):
        model.set_adapter(name)
        deltas.append(layer(x) - layer.base_layer(x))
    model.base_model.set_adapter(["one", "two"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + sum(deltas))


def test_a_copy_after_a_training_step_is_independent():
    model = adapt(tiny_llama(), sira(share_router=True))
    model(input_ids=IDS, labels=IDS).loss.backward()
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    fill(twin, seed=4)
    assert torch.equal(logits(model), before)
    assert not torch.allclose(logits(twin), before)
    q, k = (twin.get_submodule(f"base_model.model.model.layers.0.self_attn.{n}_proj") for n in "qk")
    assert k.parts["default"].leader == [q]
    # hooks of the copy belong to the copy
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with mixora.passes.tracing() as trace:
        twin(input_ids=IDS, attention_mask=mask)
    assert int(trace.observations[0].routing.valid_T.sum()) == 13
    assert not twin.unload()._forward_pre_hooks
    assert model.get_base_model()._forward_pre_hooks


def test_one_config_serves_several_models():
    config = sira()
    first, second = get_peft_model(tiny_llama(), config), get_peft_model(tiny_bert(), config)
    assert config.plan is None
    assert len(first.peft_config["default"].plan) == len(second.peft_config["default"].plan) == 8


def test_other_entries_than_the_peft_model_work_too():
    """The bare base model and its backbone run the adapters, with the mask that they were given."""
    model = adapt(tiny_llama(), sira())
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    for entry in (model, model.get_base_model(), model.get_base_model().model):
        with mixora.passes.tracing() as trace:
            entry(IDS, mask)
        assert {int(o.routing.valid_T.sum()) for o in trace.observations} == {13}


def test_peft_model_is_an_ordinary_one():
    model = adapt(tiny_llama(), sira(task_type="CAUSAL_LM"))
    assert isinstance(model, PeftModel)
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == 4608
    assert everything > trainable


def test_the_status_names_the_type():
    status = adapt(tiny_llama(), sira()).get_model_status()
    assert (status.num_adapter_layers, status.enabled) == (8, True)
    assert status.peft_types == {"default": "MIXORA"}
