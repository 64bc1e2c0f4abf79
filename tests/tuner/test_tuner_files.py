"""Adapters on disk: every way to load gives the same bits; what does not fit is said in one error."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

import mixora
from mixora.errors import CheckpointError, ConfigError
from tests import versions
from tests.models import adapt, tiny_llama, token_ids

IDS = token_ids(2, 8)
Q_0 = "model.layers.0.self_attn.q_proj"


def sira(**changes):
    sizes = {"num_experts": 4, "top_k": 2, "rank": 2, "task_type": "CAUSAL_LM"}
    return mixora.recipe("sira", **{**sizes, **changes})


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits


@pytest.fixture(params=[False, True], ids=["", "shared"])
def saved(request, tmp_path):
    """A base and an adapter on disk, and what they compute."""
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = adapt(base, sira(share_router=request.param))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, logits(model)


@versions.native
@pytest.mark.parametrize("name", ["default", "other"])
def test_transformers_own_loading(saved, name):
    folder, expected = saved
    model = tiny_llama()
    model.load_adapter(str(folder / "adapter"), adapter_name=name)
    assert torch.equal(logits(model), expected)
    with mixora.passes.tracing() as trace:
        model(IDS, torch.tensor([[1] * 8, [1] * 5 + [0] * 3]))
    assert {int(o.routing.valid_T.sum()) for o in trace.observations} == {13}
    model.disable_adapters()
    assert torch.equal(logits(model), logits(tiny_llama()))


@pytest.mark.parametrize("saved", [True], indirect=True)
def test_a_fresh_process_computes_the_same(saved):
    folder, expected = saved
    program = (
        "import sys, torch, mixora; from peft import AutoPeftModelForCausalLM as Auto; folder = sys.argv[1];"
        "model = Auto.from_pretrained(folder + '/adapter').eval(); ids = torch.load(folder + '/ids.pt');"
        "torch.save(model(input_ids=ids).logits.detach(), folder + '/logits.pt')"
    )
    torch.save(IDS, folder / "ids.pt")
    source = str(Path(mixora.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(folder / "logits.pt"), expected, rtol=1e-6, atol=1e-6)


def test_the_files_hold_tensors_by_kind_and_the_plan(saved):
    folder, _ = saved
    with safe_open(folder / "adapter" / "adapter_model.safetensors", framework="pt") as file:
        keys = set(file.keys())
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    is_shared = config["rules"]["attention"]["router"]["share_router"]
    prefix = f"base_model.model.{Q_0}.mixora_"
    assert shapes[prefix + "A"] == (8, 32)
    assert shapes[prefix + "B"] == (8, 32)
    assert shapes[prefix + "router"] == (4, 32)
    assert sum("router" in key for key in keys) == (4 if is_shared else 8)
    assert len(keys) == 16 + (4 if is_shared else 8)
    assert (config["peft_type"], config["recipe"]) == ("MIXORA", "sira")
    assert config["plan"][0]["path"] == Q_0
    assert not list((folder / "adapter").glob("*.bin"))


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (
            lambda: tiny_llama(layers=1),
            ["4 differences", r"model\.layers\.1\.self_attn\.q_proj: missing in this model"],
        ),
        (
            lambda: tiny_llama(layers=3),
            ["4 differences", r"model\.layers\.2\.self_attn\.k_proj: not in the adapter's plan"],
        ),
        (
            lambda: tiny_llama(num_key_value_heads=4),
            [r"layers\.0\.self_attn\.k_proj\.out_features: adapter 16, model 32", r"layers\.1\.self_attn\.v_proj\."],
        ),
    ],
    ids=["fewer layers", "more layers", "other shape"],
)
def test_another_base_is_refused_in_one_error(saved, make, messages):
    with pytest.raises(CheckpointError) as caught:
        PeftModel.from_pretrained(make(), saved[0] / "adapter")
    for message in messages:
        assert caught.match(message)


def rewrite(folder, change):
    path = folder / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def test_a_damaged_plan_is_named(saved):
    rewrite(saved[0], lambda config: config["plan"][0].pop("path"))
    with pytest.raises(CheckpointError, match="stored plan is damaged"):
        PeftModel.from_pretrained(tiny_llama(), saved[0] / "adapter")


def test_a_setting_that_this_version_does_not_know_is_refused(saved):
    rewrite(saved[0], lambda config: config["rules"]["attention"]["router"].update(depth=3))
    with pytest.raises(ConfigError, match=r"rules\.attention\.router\.depth: unknown key"):
        PeftModel.from_pretrained(tiny_llama(), saved[0] / "adapter")


def test_another_kernel_is_no_other_plan(saved):
    folder, expected = saved
    rewrite(folder, lambda config: config["rules"]["attention"].update(kernel="loop"))
    model = PeftModel.from_pretrained(tiny_llama(), folder / "adapter")
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@versions.lora_export
def test_plain_lora_exports_to_peft(tmp_path):
    from peft import save_as_lora

    model = adapt(tiny_llama(), mixora.recipe("lora", rank=4, alpha=8))
    save_as_lora(tmp_path, model, rank=4)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert again.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-5)
