"""Adapters that MoE-PEFT wrote (tests/fixtures/moe_peft/make.py): their logits, and what cannot be read."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from mixora.conversion.moe_peft import convert_moe_peft
from mixora.errors import CheckpointError, ConfigError, ModelError
from tests.models import tiny_gpt2

FIXTURE = Path(__file__).parents[1] / "fixtures" / "moe_peft"
BASE = FIXTURE / "base"
METHODS = ["mola", "mixlora"]
THEIRS = load_file(FIXTURE / "logits.safetensors")
INPUTS = {name: THEIRS[name] for name in ("input_ids", "attention_mask")}
REAL = INPUTS["attention_mask"].bool()


def read(out, **settings):
    base = AutoModelForCausalLM.from_pretrained(BASE)
    return mixora.from_pretrained(base, out / "adapter", **settings)


def assert_gives_their_logits(method, out):
    with torch.no_grad():
        found = read(out).eval()(**INPUTS).logits
    torch.testing.assert_close(found[REAL], THEIRS[method][REAL], rtol=1e-5, atol=1e-5)


def changed(folder, method, **settings):
    """A copy of an adapter with other settings; None removes one."""
    shutil.copytree(FIXTURE / method, folder)
    file = folder / "adapter_config.json"
    merged = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({name: value for name, value in merged.items() if value is not None}))
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_gives_their_logits(tmp_path, method):
    mixora.convert(FIXTURE / method, tmp_path, model=BASE)
    assert_gives_their_logits(method, tmp_path)
    assert not (tmp_path / "base").exists()


def test_the_adapters_matter():
    """Else equal logits would say nothing of them."""
    with torch.no_grad():
        dense = AutoModelForCausalLM.from_pretrained(BASE)(**INPUTS).logits
    for method in METHODS:
        assert (dense - THEIRS[method])[REAL].abs().mean() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_it_can_be_trained_on(tmp_path, method):
    mixora.convert(FIXTURE / method, tmp_path, model=BASE)
    model = read(tmp_path, is_trainable=True)
    model(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if "mixora_" in name}
    assert trained and all(p.grad is not None and p.grad.any() for p in trained.values())


def test_what_was_written_says_where_it_comes_from(tmp_path):
    table = mixora.convert(FIXTURE / "mola", tmp_path, model=BASE)
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (saved["recipe"], saved["base_model_name_or_path"]) == ("mola", str(BASE))
    assert saved["plan"] == table.to_list()
    assert {site.scale for site in table.sites} == {6 / math.sqrt(4)}
    assert saved["rules"]["linears"]["expert"]["dropout"] == 0.05


def test_the_base_that_the_adapter_names(tmp_path, monkeypatch):
    monkeypatch.chdir(FIXTURE.parents[2])
    mixora.convert(FIXTURE / "mola", tmp_path / "out")
    assert_gives_their_logits("mola", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=r"no such file or folder.*needs its base's configuration: `model` \(--model\)"
    ):
        mixora.convert(FIXTURE / "mola", tmp_path / "second")
    nameless = changed(tmp_path / "nameless", "mola", base_model_name_or_path=None)
    with pytest.raises(CheckpointError, match=r"nameless: names no base; valid: `model` \(--model\)"):
        mixora.convert(nameless, tmp_path / "second")


def test_targets_may_be_a_table(tmp_path):
    targets = {"q_proj": True, "v_proj": True, "gate_proj": True, "down_proj": True, "o_proj": False, "fc1": False}
    mixora.convert(changed(tmp_path / "theirs", "mola", target_modules=targets), tmp_path / "out", model=BASE)
    assert_gives_their_logits("mola", tmp_path / "out")


def test_alpha_over_rank_without_rslora(tmp_path):
    folder = changed(tmp_path / "theirs", "mola", use_rslora=None)
    table = mixora.convert(folder, tmp_path / "out", model=BASE)
    assert {site.scale for site in table.sites} == {6 / 4}


def test_all_tensors_that_do_not_fit_stand_in_one_error(tmp_path):
    folder = changed(tmp_path / "theirs", "mola")
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    del tensors["mola.layers.1.mlp.gate_proj.experts.2.lora_A.weight"]
    tensors["mola.layers.0.self_attn.q_proj.moe_gate.weight"] = torch.zeros(4, 32)
    tensors["mola.layers.0.self_attn.v_proj.experts.0.lora_B.weight"] = torch.zeros(4, 16)
    tensors["classifier"] = torch.zeros(2, 32)
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError) as caught:
        mixora.convert(folder, tmp_path / "out", model=BASE)
    for message in (
        "4 tensors do not fit a MOLA adapter on",
        r"mola\.layers\.1\.mlp\.gate_proj\.experts\.2\.lora_A\.weight: missing, expected \[4, 32\]",
        r"mola\.layers\.0\.self_attn\.q_proj\.moe_gate\.weight: got \[4, 32\], expected \[3, 32\]",
        r"mola\.layers\.0\.self_attn\.v_proj\.experts\.0\.lora_B\.weight: got \[4, 16\], expected \[16, 4\]",
        "classifier: unexpected",
    ):
        assert caught.match(message)
    assert not (tmp_path / "out").exists()


def test_experts_and_attention_have_settings_of_their_own(tmp_path):
    table = mixora.convert(FIXTURE / "mixlora", tmp_path, model=BASE)
    sites = {site.path.removeprefix("model.layers.1."): site for site in table.sites}
    assert (sites["mlp.up_proj"].ranks, sites["mlp.up_proj"].scale) == ((3,) * 5, 5 / 3)
    assert (sites["self_attn.k_proj"].ranks, sites["self_attn.k_proj"].scale) == ((2,), 3 / 2)
    rules = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["rules"]
    assert {name: rule["expert"]["dropout"] for name, rule in rules.items()} == {"ffn": 0.1, "attention": 0.05}


def test_mixlora_on_feed_forward_parts_alone(tmp_path):
    """Experts take the settings of the adapter where they have none of their own."""
    own = {"r": 3, "lora_alpha": 5, "expert_lora": None, "act_fn": None, "jitter_noise": 0.0}
    folder = changed(tmp_path / "theirs", "mixlora", target_modules=["up_proj", "down_proj", "gate_proj"], **own)
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    kept = {name: tensor for name, tensor in tensors.items() if "self_attn" not in name}
    torch.save(kept, folder / "adapter_model.bin")
    table = mixora.convert(folder, tmp_path / "out", model=BASE)
    assert {(site.expert, site.scale) for site in table.sites} == {("ffn_lora", 5 / 3)}
    assert len(load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")) == 2 * (3 * 2 + 1)


def test_the_router_and_the_attention_of_mixlora_are_looked_for(tmp_path):
    folder = changed(tmp_path / "theirs", "mixlora")
    tensors = torch.load(folder / "adapter_model.bin", weights_only=True)
    del tensors["mixlora.layers.0.mlp.moe_gate.weight"]
    del tensors["mixlora.layers.1.self_attn.k_proj.lora_B.weight"]
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError) as caught:
        mixora.convert(folder, tmp_path / "out", model=BASE)
    assert caught.match("2 tensors do not fit a MIXLORA adapter on")
    assert caught.match(r"mixlora\.layers\.0\.mlp\.moe_gate\.weight: missing, expected \[5, 32\]")
    assert caught.match(r"mixlora\.layers\.1\.self_attn\.k_proj\.lora_B\.weight: missing, expected \[16, 2\]")


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_code_in_the_file_is_not_run(tmp_path):
    folder = changed(tmp_path / "theirs", "mola")
    torch.save({"mola.layers.0.self_attn.q_proj.moe_gate.weight": Harmful()}, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin: is damaged or holds more than tensors"):
        mixora.convert(folder, tmp_path / "out", model=BASE)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights(tmp_path):
    folder = changed(tmp_path / "theirs", "mola")
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"theirs: has no adapter_model\.bin"):
        mixora.convert(folder, tmp_path / "out", model=BASE)


MOLA_SETTINGS = [
    ({"peft_type": "LORA"}, "peft_type: got 'LORA'; valid: MOLA, MIXLORA"),
    ({"peft_type": None}, "peft_type: got None; valid: MOLA, MIXLORA"),
    ({"use_dora": True}, "use_dora: got True; valid: False"),
    ({"bias": "all"}, "bias: got 'all'; valid: 'none'"),
    ({"routing_strategy": "loramoe"}, "routing_strategy: got 'loramoe'; valid: 'mola'"),
    ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS'; valid: 'CAUSAL_LM' or 'QUESTION_ANS'"),
    ({"target_modules": ["q_proj", "fc1"]}, "target_modules.1: got 'fc1'; valid: 'q_proj', 'k_proj'"),
    ({"target_modules": []}, "target_modules: got .*; valid: "),
    ({"jitter_noise": 0.1}, r"jitter_noise: unknown key.*known: .*lora_alpha"),
    ({"r": 0, "num_experts": 2.5}, r"(?s)r: got 0; valid: .*num_experts: got 2\.5; valid: "),
]
MIXLORA_SETTINGS = [
    ({"routing_strategy": "mixlora-switch"}, "routing_strategy: got 'mixlora-switch'; valid: 'mixlora'"),
    ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, r"(?s)got 'mixlora-dynamic'; valid: 'mixlora'.*top_p: unk"),
    ({"jitter_noise": 0.01}, r"jitter_noise: got 0\.01; valid: less than or equal to 0"),
    ({"act_fn": "gelu_new"}, "act_fn: got 'gelu_new'; valid: that of the base, 'silu'"),
    ({"target_modules": ["q_proj", "up_proj"]}, "leaves out gate_proj, down_proj; valid for MIXLORA: all of gate_proj"),
    ({"expert_lora": {"use_dora": True}}, r"expert_lora\.use_dora: got True; valid: False"),
    ({"expert_lora": {"rank": 3}}, r"expert_lora\.rank: unknown key"),
    ({"use_dora": True}, "use_dora: got True; valid: False"),
]


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [("mola", *case) for case in MOLA_SETTINGS] + [("mixlora", *case) for case in MIXLORA_SETTINGS],
)
def test_settings_that_cannot_be_met(tmp_path, method, settings, message):
    folder = changed(tmp_path / "theirs", method, **settings)
    with pytest.raises(CheckpointError, match=message):
        mixora.convert(folder, tmp_path / "out", model=BASE)
    assert not (tmp_path / "out").exists()


def test_more_experts_kept_than_there_are(tmp_path):
    with pytest.raises(ConfigError, match="top_k 4 is more than num_experts 3"):
        mixora.convert(changed(tmp_path / "theirs", "mola", top_k=4), tmp_path / "out", model=BASE)


def test_a_base_of_another_architecture(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"got a gpt2 model; valid for .*mola: llama, mistral, qwen2, gemma"):
        mixora.convert(FIXTURE / "mola", tmp_path / "out", model=tmp_path / "gpt2")


@pytest.mark.parametrize("method", METHODS)
def test_the_command(tmp_path, method):
    words = ["convert", str(FIXTURE / method), "--model", str(BASE), "--out"]
    result = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "sites in model.layers" in result.output and "not written" in result.output
    assert_gives_their_logits(method, tmp_path / "out")
    machine = CliRunner().invoke(app, [*words, str(tmp_path / "second"), "--json"])
    assert json.loads(machine.output)["base"] is None
    again = CliRunner().invoke(app, [*words, str(tmp_path / "out")])
    assert again.exit_code == 2 and "is not empty" in again.output


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_written_where_nothing_is_claimed(method):
    before = sorted(FIXTURE.rglob("*"))
    table = convert_moe_peft(FIXTURE / method, None, BASE)
    assert len(table.sites) > 0 and sorted(FIXTURE.rglob("*")) == before
