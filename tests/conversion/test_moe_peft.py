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
from mixora.errors import CheckpointError, ConfigError, ModelError
from tests.models import tiny_gpt2

FIXTURE = Path(__file__).parents[1] / "fixtures" / "moe_peft"
BASE = FIXTURE / "base"
METHODS = ["mola"]
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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type: got 'LORA'; valid: MOLA"),
        ({"peft_type": None}, "peft_type: got None; valid: MOLA"),
        ({"use_dora": True}, "use_dora: got True; valid: False"),
        ({"bias": "all"}, "bias: got 'all'; valid: 'none'"),
        ({"routing_strategy": "loramoe"}, "routing_strategy: got 'loramoe'; valid: 'mola'"),
        ({"task_type": "SEQ_CLS"}, "task_type: got 'SEQ_CLS'; valid: 'CAUSAL_LM' or 'QUESTION_ANS'"),
        ({"target_modules": ["q_proj", "fc1"]}, "target_modules.1: got 'fc1'; valid: 'q_proj', 'k_proj'"),
        ({"target_modules": []}, "target_modules: got .*; valid: "),
        ({"jitter_noise": 0.1}, r"jitter_noise: unknown key.*known: .*lora_alpha"),
        ({"r": 0, "num_experts": 2.5}, r"(?s)r: got 0; valid: .*num_experts: got 2\.5; valid: "),
    ],
)
def test_settings_that_cannot_be_met(tmp_path, settings, message):
    folder = changed(tmp_path / "theirs", "mola", **settings)
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
