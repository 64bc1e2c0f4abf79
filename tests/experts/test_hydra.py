"""Experts with one common A: what is stored, what is counted, what it equals."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open

import mixora
from mixora.errors import ConfigError, MixoraError
from tests.models import OneLinear, adapt, tiny_llama, token_ids

Q_0 = "base_model.model.model.layers.0.self_attn.q_proj.mixora_"


def test_the_common_a_is_stored_once(tmp_path):
    """4 experts of rank 8 on a linear 32 x 32."""
    model = adapt(tiny_llama(), mixora.recipe("hydralora", task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", framework="pt") as file:
        shapes = {kind: file.get_slice(Q_0 + kind).get_shape() for kind in ("A", "B", "router")}
    assert shapes == {"A": [8, 32], "B": [32, 32], "router": [4, 32]}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    ids = token_ids(2, 6)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def hydra(router, **changes):
    parts = {"expert": {"kind": "hydra", "rank": 8}, "router": router}
    return mixora.MixoraConfig(rules={"all": {"targets": ["proj"], **parts, **changes}})


def test_with_sparse_routing_a_token_is_computed_by_all_of_a_and_k_of_b():
    """I = 6, O = 5, rank 8, 2 of 4 experts: A 48, B 40 each, router 24."""
    plan = mixora.plan(OneLinear(6, 5), hydra({"kind": "topk", "num_experts": 4, "top_k": 2}))
    assert (plan.parameters, plan.active_parameters) == (48 + 4 * 40 + 24, 48 + 2 * 40 + 24)


def test_it_is_lora_experts_whose_a_are_copies():
    x = torch.randn(3, 7, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    base = OneLinear(6, 5)
    soft = {"kind": "soft", "num_experts": 3}
    ours = adapt(OneLinear(6, 5), hydra(soft))
    lora = {"targets": ["proj"], "expert": {"kind": "lora", "rank": 8}, "router": soft}
    twin = adapt(OneLinear(6, 5), mixora.MixoraConfig(rules={"all": lora}))
    one, other = (m.base_model.model.proj for m in (ours, twin))
    with torch.no_grad():
        for module in (one, other):
            module.base_layer.load_state_dict(base.proj.state_dict())
        other.mixora_A["default"].copy_(one.mixora_A["default"].repeat(3, 1))
        other.mixora_B["default"].copy_(one.mixora_B["default"])
        other.mixora_router["default"].copy_(one.mixora_router["default"])
    torch.testing.assert_close(ours(x), twin(x))


def test_scale_dropout_and_start_are_those_of_lora():
    config = hydra({"kind": "soft"}, expert={"kind": "hydra", "rank": 4, "alpha": 6.0, "dropout": 0.5})
    model = get_peft_model(OneLinear(8, 8), config)
    layer = model.base_model.model.proj
    assert layer.parts["default"].expert.scale(layer.parts["default"].shape) == 1.5
    assert layer.mixora_A["default"].abs().max() <= 8**-0.5
    assert layer.mixora_A["default"].std() > 0.1
    assert (layer.mixora_B["default"] == 0).all()
    with torch.no_grad():
        layer.mixora_B["default"].fill_(1.0)
    x = torch.randn(4, 8)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("recipe", ["molora", "hydralora", "adamole", "adamoe"])
def test_what_is_routed_by_the_input_cannot_be_merged(recipe):
    model = adapt(tiny_llama(layers=1), mixora.recipe(recipe))
    with pytest.raises(MixoraError, match="cannot be merged: its router chooses experts by the input"):
        model.merge_and_unload()


def test_with_a_single_expert_it_merges_like_lora():
    model = adapt(OneLinear(6, 5), hydra({"kind": "single"})).eval()
    x = torch.randn(3, 6)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_unequal_ranks_in_a_site_are_refused():
    config = mixora.recipe(
        "hydralora", targets=["q_proj"], allocation={"model.layers.0.self_attn.q_proj": [2, 1, 1, 1]}
    )
    with pytest.raises(
        ConfigError,
        match=r"'hydra' experts under router 'soft' have one rank.*\[2, 1, 1, 1\]; valid: one rank for each site",
    ):
        mixora.plan(tiny_llama(layers=1), config)
