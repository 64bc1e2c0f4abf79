"""Standalone checkpoints, written and read back in this process: models, experts, routers, and what is refused."""

import json
import re

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model

import mixora
from mixora.errors import CheckpointError, ConfigError, ModelError
from mixora.mixture import mixtures_of
from mixora.standalone import modeling_mixora, write_standalone, writing
from tests.models import (
    adapt,
    fill,
    tiny_bert_classifier,
    tiny_gemma,
    tiny_gemma2,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_phi,
    tiny_qwen2,
    tiny_qwen3,
    tiny_t5,
    token_ids,
)

FAMILIES = [tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_gemma, tiny_gemma2, tiny_phi, tiny_gpt2]
IDS = token_ids(2, 9)


def pesc(**changes):
    return mixora.recipe("pesc", **{"num_experts": 4, "rank": 3, **changes})


def logits(model, **batch):
    with torch.no_grad():
        return model.eval()(**{"input_ids": IDS, **batch}).logits


@pytest.mark.parametrize("make", FAMILIES)
def test_each_family_of_bases(make, tmp_path):
    model = adapt(make(), pesc())
    expected = logits(model)
    written = write_standalone(model, tmp_path / "out")
    assert written.difference < 2e-6 and written.sites == len(mixtures_of(model))
    again = writing._read_back(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=2e-6)
    # it makes a difference, and ours is what it was
    assert not torch.allclose(logits(make()), expected, atol=1e-2) and torch.equal(logits(model), expected)
    source = (tmp_path / "out" / "modeling_mixora.py").read_text()
    assert "import mixora" not in source and "peft" not in source
    assert f"import {type(model.get_base_model()).__name__} as BaseModel" in source


# each way to weigh and to place experts that the file knows
CASES = {
    "bottleneck biases": ("pesc", {"num_experts": 4, "rank": 3, "biases": True}),
    "top-k as it is": ("pesc", {"num_experts": 4, "rank": 3, "top_k": 3, "renormalise": False}),
    "unequal ranks": ("hilo", {"targets": ["q_proj", "down_proj"]}),
    "routers shared by linears": ("sira", {"num_experts": 4, "top_k": 2, "rank": 2, "share_router": True}),
    "soft": ("molora", {"num_experts": 3, "rank": 2}),
    "a common A": ("hydralora", {"num_experts": 3, "rank": 2}),
    "drawn behind": ("adamix", {"num_experts": 3, "rank": 2}),
    "drawn and tied": ("adamix-lora", {"num_experts": 3, "rank": 2, "share": "none", "tied": True}),
    "one": ("lora", {"rank": 4, "alpha": 1.7}),
}


@pytest.mark.parametrize("case", CASES)
def test_each_way_to_route(case, tmp_path):
    name, changes = CASES[case]
    model = adapt(tiny_llama(layers=4 if name == "hilo" else 2), mixora.recipe(name, **changes))
    expected = logits(fill(model, seed=2, names=("mixora_A", "mixora_B", "mixora_bias", "mixora_router")))
    assert write_standalone(model, tmp_path / "out").difference < 1e-5
    again = writing._read_back(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(tiny_llama(layers=4 if name == "hilo" else 2)), expected, atol=1e-3)


@pytest.mark.parametrize("share", ["down", "up", "none"])
def test_a_common_a_whose_b_are_drawn_is_one_expert(share, tmp_path):
    parts = {"kind": "hydra", "rank": 2, "alpha": 8}, {"kind": "uniform", "num_experts": 3, "share": share}
    rule = dict(zip(("targets", "expert", "router"), (["q_proj"], *parts), strict=True))
    model = fill(adapt(tiny_llama(), mixora.MixoraConfig(rules={"all": rule})), seed=2, names=("mixora_",))
    expected = logits(model)
    write_standalone(model, tmp_path / "out")
    again = writing._read_back(tmp_path / "out", torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    found, ours = (m.get_submodule("model.layers.0.self_attn.q_proj") for m in (again, model.get_base_model()))
    downs, ups = (
        [tensor for name, tensor in ours.parameters_of("default").items() if name.startswith(kind)] for kind in "AB"
    )
    torch.testing.assert_close(found.mixora_adapter.down, sum(downs) / len(downs))
    torch.testing.assert_close(found.mixora_adapter.up, sum(ups) / len(ups))


def test_an_adapter_by_its_formula():
    """The file's layer against the formula of PESC, token by token, in float64."""
    torch.manual_seed(0)
    layer = modeling_mixora.Adapter(True, 5, 6, [2, 3, 2], 2, True, 0.5, True).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x_TI, y_TO = torch.randn(7, 5).double(), torch.randn(7, 6).double()
    downs, ups = layer.down.split([2, 3, 2]), layer.up.split([2, 3, 2])
    biases = layer.down_bias.split([2, 3, 2])
    for x_I, y_O, found_O in zip(x_TI, y_TO, layer(x_TI[None], y_TO[None])[0], strict=True):
        probs_E = torch.softmax(layer.router @ x_I, dim=0)
        chosen = probs_E.argsort(descending=True)[:2].tolist()
        expected_O = y_O.clone()
        for e in chosen:
            hidden = torch.nn.functional.gelu(downs[e] @ y_O + biases[e])
            weight = 0.5 * probs_E[e] / probs_E[chosen].sum()
            expected_O += weight * (ups[e].T @ hidden + layer.up_bias[e])
        # the router decides in fp32
        torch.testing.assert_close(found_O, expected_O, rtol=1e-5, atol=1e-5)


def test_low_precision_keeps_routers_in_fp32_and_the_same_tensors(tmp_path):
    model = adapt(tiny_llama().bfloat16(), pesc(), autocast_adapter_dtype=False)
    written = write_standalone(model, tmp_path / "out")
    assert written.difference < 0.1
    again = writing._read_back(tmp_path / "out", torch.bfloat16)
    kinds = {name.rpartition(".")[2]: p.dtype for name, p in again.named_parameters() if "mixora" in name}
    assert kinds == {"down": torch.bfloat16, "up": torch.bfloat16, "router": torch.float32}
    ours = model.base_model.model.model.layers[1].mlp.parameters_of("default")
    theirs = again.model.layers[1].mlp.mixora_adapter
    assert torch.equal(ours["A"], theirs.down) and torch.equal(ours["router"], theirs.router)
    # a model of another type is still one model
    assert {p.dtype for p in again.float().parameters()} == {torch.float32}


def test_padding_disturbs_no_other_token(tmp_path):
    model = adapt(tiny_llama(), pesc())
    write_standalone(model, tmp_path / "out")
    again = writing._read_back(tmp_path / "out", torch.float32)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    expected, found = logits(model, attention_mask=mask), logits(again, attention_mask=mask)
    torch.testing.assert_close(found[mask == 1], expected[mask == 1], rtol=0, atol=2e-6)


def test_what_is_in_the_folder(tmp_path):
    write_standalone(adapt(tiny_llama(tie_word_embeddings=True), pesc()), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    weights = {"config.json", "generation_config.json", "model.safetensors", "modeling_mixora.py"}
    assert names == {".mixora", "README.md", *weights}
    assert "beside 16 of its modules" in ModelCard.load(tmp_path / "out" / "README.md").text
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("mixora", ["MixoraForCausalLM"])
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_mixora.MixoraForCausalLM"
    assert str(tmp_path) not in json.dumps(config)
    with pytest.raises(ConfigError, match="is not empty"):
        write_standalone(adapt(tiny_llama(), pesc()), tmp_path / "out")


REFUSED = {
    "mixlora": (tiny_llama, {"num_experts": 4, "rank": 2}, CheckpointError, "gate_proj has experts of kind 'ffn_lora'"),
    "adamole": (tiny_llama, {"num_experts": 4, "rank": 2}, CheckpointError, "q_proj has a router of kind 'threshold'"),
    "adamoe": (tiny_llama, {"rank": 2}, CheckpointError, "q_proj has a router of kind 'null_topk'"),
    "sira": (
        tiny_llama,
        {"num_experts": 4, "top_k": 2, "capacity_at_inference": True},
        CheckpointError,
        "q_proj has a capacity limit that holds in evaluation too",
    ),
    "pesc": (tiny_t5, {"rank": 2}, ModelError, "the base is a T5ForConditionalGeneration; valid: a causal language"),
    "lora": (tiny_bert_classifier, {}, ModelError, "the base is a BertForSequenceClassification"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    make, changes, error, message = REFUSED[name]
    model = adapt(make(), mixora.recipe(name, **changes))
    with pytest.raises(error, match=re.escape(message)):
        write_standalone(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_reasons_to_refuse(tmp_path):
    whole = adapt(tiny_llama(), mixora.recipe("lora", modules_to_save=["lm_head"]))
    with pytest.raises(CheckpointError, match="standalone: the adapter trained lm_head whole; valid: one without"):
        write_standalone(whole, tmp_path / "out")
    merged = adapt(tiny_llama(), mixora.recipe("lora"))
    merged.merge_adapter()
    with pytest.raises(CheckpointError, match="q_proj has its adapter merged into the weight"):
        write_standalone(merged, tmp_path / "out")
    other = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"the active adapter 'default' is of type .*; valid: MIXORA"):
        write_standalone(other, tmp_path / "out")
    quantised = adapt(tiny_llama(), pesc())
    quantised.get_base_model().is_quantized = True
    with pytest.raises(ModelError, match="standalone: the base is quantised"):
        write_standalone(quantised, tmp_path / "out")

    class Own(type(tiny_llama())):
        pass

    with pytest.raises(ModelError, match="standalone: the base is a Own; valid: a causal language model that transf"):
        write_standalone(adapt(Own(tiny_llama().config), pesc()), tmp_path / "out")


def test_a_model_that_computes_something_else_is_an_error(tmp_path, monkeypatch):
    settings_of = writing._settings_of
    monkeypatch.setattr(writing, "_settings_of", lambda *of: settings_of(*of) | {"scale": 3.0})
    with pytest.raises(ModelError, match=r"logits differ by \d+.\d% from those of the adapter on a LlamaForCausalLM"):
        write_standalone(adapt(tiny_llama(), pesc()), tmp_path / "out")
