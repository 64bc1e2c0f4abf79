"""What is written: read by plain PEFT in a process that knows no mixora, with the same logits."""

import json
import warnings

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import mixora
from mixora.errors import CheckpointError, ConfigError, MixoraError, ModelError
from mixora.merging.export import shortest_names
from tests.models import adapt, fill, tiny_bart, tiny_bert_classifier, tiny_gpt2, tiny_llama, token_ids

IDS = token_ids(2, 9)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def saved(make, folder, config, **settings):
    """The base in a folder, and the adapter on it."""
    base = make()
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    return adapt(base, config, **settings)


MODELS = {
    "llama": (tiny_llama, "AutoModelForCausalLM", {"targets": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}),
    "bert": (
        tiny_bert_classifier,
        "AutoModelForSequenceClassification",
        {"targets": ["all-linear"], "task_type": "SEQ_CLS", "rank": 4, "alpha": 6},
    ),
    "gpt2": (tiny_gpt2, "AutoModelForCausalLM", {"targets": ["c_attn", "c_fc"], "task_type": "CAUSAL_LM"}),
    "unequal": (tiny_llama, "AutoModelForCausalLM", {"targets": ["all-linear"], "rank": [2, 6], "alpha": 1.7}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_plain_peft_computes_the_same(name, by_plain_peft, tmp_path):
    make, auto, changes = MODELS[name]
    model = saved(make, tmp_path, mixora.recipe("lora", **changes))
    if name == "bert":
        fill(model, seed=3, names=("modules_to_save.default",))
    expected = logits(model)
    merged = mixora.merge(model, tmp_path / "out")
    assert {(site.method, site.error) for site in merged.sites} == {("exact", 0.0)}
    found = by_plain_peft(auto, tmp_path / "base", tmp_path / "out")
    assert not torch.allclose(logits(make()), expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    # the model still is what it was
    assert torch.equal(logits(model), expected)


def written(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_plain_case_needs_no_patterns(tmp_path):
    mixora.merge(saved(tiny_llama, tmp_path, mixora.recipe("lora", rank=4, alpha=8)), tmp_path / "out")
    config = written(tmp_path / "out")
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 8)
    assert config["rank_pattern"] == config["alpha_pattern"] == {} and config["modules_to_save"] is None
    assert sorted(config["target_modules"]) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    names = set(load_file(tmp_path / "out" / "adapter_model.safetensors"))
    assert len(names) == 16 and all(n.endswith(("lora_A.weight", "lora_B.weight")) for n in names)
    assert config.keys() <= LoraConfig(r=1).to_dict().keys() | {"peft_version", "auto_mapping"}


def test_unequal_ranks_stand_in_patterns_that_name_one_module_each(tmp_path):
    config = mixora.recipe("lora", targets=["q_proj"], rank=[2, 6], alpha=12)
    model = saved(lambda: tiny_llama(layers=12), tmp_path, config)
    expected = logits(model)
    mixora.merge(model, tmp_path / "out")
    found = written(tmp_path / "out")
    assert len(found["rank_pattern"]) == len(found["alpha_pattern"]) + 6 == 6
    again = PeftModel.from_pretrained(tiny_llama(layers=12), tmp_path / "out")
    ranks = [layer.self_attn.q_proj.r["default"] for layer in again.base_model.model.model.layers]
    assert ranks == [2] * 6 + [6] * 6
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


def test_a_scale_that_no_whole_alpha_gives_goes_into_b(tmp_path):
    model = saved(tiny_llama, tmp_path, mixora.recipe("lora", rank=4, alpha=1.2))
    mixora.merge(model, tmp_path / "out")
    assert (written(tmp_path / "out")["r"], written(tmp_path / "out")["lora_alpha"]) == (4, 4)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    path = "base_model.model.model.layers.1.self_attn.q_proj."
    b = model.get_submodule(path[:-1]).mixora_B["default"].detach()
    torch.testing.assert_close(tensors[path + "lora_B.weight"], 0.3 * b.T)


def test_two_scales_of_one_rank_need_no_pattern(tmp_path):
    parts = {"expert": {"kind": "lora", "rank": 4}, "router": {"kind": "single"}}
    rules = {
        "q": {"targets": ["q_proj"], **parts},
        "v": {"targets": ["v_proj"], **parts, "expert": {"kind": "lora", "rank": 4, "scale": 2.0}},
    }
    model = saved(tiny_llama, tmp_path, mixora.MixoraConfig(rules=rules, task_type="CAUSAL_LM"))
    expected = logits(model)
    mixora.merge(model, tmp_path / "out")
    assert written(tmp_path / "out")["alpha_pattern"] == {}
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")), expected, rtol=0, atol=1e-6
    )


def test_shortest_names():
    layers = [f"model.layers.{n}.{part}" for n in (0, 1, 11) for part in ("attn.q", "attn.dense", "mlp.dense", "mlp")]
    q = [path for path in layers if path.endswith(".q")]
    assert shortest_names(q, layers) == ["q"]
    assert shortest_names([p for p in layers if p.endswith("attn.dense")], layers) == ["attn.dense"]
    assert shortest_names([p for p in layers if p.endswith("dense")], [*layers, "pooler.dense"]) == [
        "attn.dense",
        "mlp.dense",
    ]
    assert shortest_names(q[:1], layers) == q[:1]
    assert shortest_names(["proj"], ["proj"]) == ["proj"]
    assert shortest_names(["dense"], ["dense", "pooler.dense"]) == ["dense"]


def test_truncation_is_the_nearest_adapter_and_says_how_near(tmp_path):
    model = saved(tiny_llama, tmp_path, mixora.recipe("lora", targets=["q_proj"], rank=8, alpha=4))
    layers = model.base_model.model.model.layers
    dense = [layer.self_attn.q_proj.get_delta_weight("default").detach() for layer in layers]
    merged = mixora.merge(model, tmp_path / "out", rank=3)
    assert {(site.method, site.rank) for site in merged.sites} == {("truncated", 3)}
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out")
    for layer, whole, site in zip(again.base_model.model.model.layers, dense, merged.sites, strict=True):
        values = torch.linalg.svdvals(whole)
        distance = float((layer.self_attn.q_proj.get_delta_weight("default") - whole).norm() / whole.norm())
        assert abs(distance - float(values[3:].norm() / values.norm())) < 1e-5
        assert abs(site.error - distance) < 1e-5
    assert "truncated" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("make", "auto"),
    [(tiny_llama, AutoModelForCausalLM), (tiny_bert_classifier, AutoModelForSequenceClassification)],
)
def test_a_dense_checkpoint_computes_the_same_without_peft(make, auto, tmp_path):
    task = "SEQ_CLS" if make is tiny_bert_classifier else "CAUSAL_LM"
    model = saved(make, tmp_path, mixora.recipe("lora", targets=["all-linear"], task_type=task))
    expected = logits(fill(model, seed=3, names=("modules_to_save.default",)))
    merged = mixora.merge(model, tmp_path / "out", to="dense")
    assert not (tmp_path / "out" / "adapter_config.json").exists() and merged.form == "dense"
    torch.testing.assert_close(logits(auto.from_pretrained(tmp_path / "out")), expected, rtol=1e-5, atol=1e-5)


def test_a_dense_checkpoint_of_a_truncated_pair(tmp_path):
    config = mixora.recipe("lora", targets=["q_proj"], rank=8)
    mixora.merge(saved(tiny_llama, tmp_path, config), tmp_path / "adapter", rank=2)
    mixora.merge(saved(tiny_llama, tmp_path, config), tmp_path / "dense", rank=2, to="dense")
    expected = logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_head_tied_to_the_embeddings_cannot_be_made_dense(tmp_path):
    model = saved(lambda: tiny_llama(tie_word_embeddings=True), tmp_path, mixora.recipe("lora", targets=["lm_head"]))
    with pytest.raises(ModelError, match=r"lm_head: cannot be merged: shares its weight with model.embed_tokens"):
        mixora.merge(model, tmp_path / "out", to="dense")


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize(("make", "is_tied"), [(tiny_llama, False), (tiny_bart, True)])
def test_a_head_that_was_trained_is_tied_no_more(make, is_tied, tmp_path):
    """By the configuration, which some loaders believe; but it ties both halves of an encoder-decoder too."""
    recipe = mixora.recipe("lora", targets=["all-linear"], modules_to_save=["lm_head"])
    model = saved(lambda: make(tie_word_embeddings=True), tmp_path, recipe)
    fill(model, seed=3, names=("lm_head.modules_to_save.default",))
    batch = {"input_ids": IDS} if make is tiny_llama else {"input_ids": IDS, "decoder_input_ids": IDS}
    with torch.no_grad():
        expected = model.eval()(**batch).logits
    mixora.merge(model, tmp_path / "out", to="dense")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is is_tied
    again = type(make()).from_pretrained(tmp_path / "out")
    torch.testing.assert_close(again(**batch).logits, expected, rtol=1e-5, atol=1e-5)


def test_other_adapters_stay_out(tmp_path):
    model = saved(tiny_llama, tmp_path, mixora.recipe("lora", targets=["q_proj"], task_type="CAUSAL_LM"))
    model.add_adapter("other", mixora.recipe("sira", targets=["q_proj", "o_proj"]))
    expected = logits(model)
    mixora.merge(model, tmp_path / "out")
    assert written(tmp_path / "out")["target_modules"] == ["q_proj"]
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-6)


def refused(model, out, error, message, **settings):
    with pytest.raises(error, match=message):
        mixora.merge(model, out, **settings)
    assert not out.exists()


def test_what_cannot_be_merged_is_refused(tmp_path):
    out = tmp_path / "out"
    routed = adapt(tiny_llama(), mixora.recipe("sira", num_experts=4, top_k=2))
    refused(routed, out, ConfigError, r"q_proj \(and 7 more sites\): cannot be merged exactly: router 'topk' of rule")
    refused(routed, out, ConfigError, r"valid: --approximate \(in Python: approximation=...\)")
    serial = adapt(tiny_llama(), mixora.recipe("pesc", rank=4))
    refused(serial, out, MixoraError, "its experts stand behind the module, with a non-linearity inside")
    plain = adapt(tiny_llama(), mixora.recipe("lora"))
    refused(plain, out, ConfigError, "rank: got 0; valid: 1 or more", rank=0)
    batches = [{"input_ids": IDS, "labels": IDS}]
    material = mixora.Approximation(batches, batches)
    refused(
        plain, out, ConfigError, "approximate: every site of this adapter is merged exactly", approximation=material
    )
    plain.merge_adapter()
    refused(plain, out, ConfigError, "the adapter is merged into the weights")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain.unmerge_adapter()
    out.mkdir()
    (out / "kept").touch()
    with pytest.raises(ConfigError, match="is not empty"):
        mixora.merge(plain, out)


def test_an_adapter_of_another_type_is_refused(tmp_path):
    from peft import get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(CheckpointError, match=r"the active adapter 'default' is of type .*; valid: MIXORA"):
        mixora.merge(model, tmp_path / "out")
