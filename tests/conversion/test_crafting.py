"""From a dense checkpoint to a sparse model in one command."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from mixora.errors import ConfigError
from tests.models import gradients, token_ids
from tests.training.conftest import bases  # noqa: F401 - fixture

SMALL = ["adapter.num_experts=4", "adapter.rank=3"]
IDS = token_ids(2, 6)


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_sparse_model_starts_as_the_dense_one_and_learns(bases, tmp_path, dtype):  # noqa: F811
    out = tmp_path / "sparse"
    result = call("craft", "--model", bases / "llama", "--out", out, *SMALL, f"model.dtype={dtype}")
    assert result.exit_code == 0, result.output
    assert "16 sites in model.layers" in result.output and "mlp" in result.output
    settings = {"dtype": getattr(torch, dtype)}
    dense = AutoModelForCausalLM.from_pretrained(bases / "llama", **settings).eval()
    sparse = AutoPeftModelForCausalLM.from_pretrained(out, is_trainable=True, **settings).eval()
    with torch.no_grad():
        assert torch.equal(sparse(input_ids=IDS).logits, dense(input_ids=IDS).logits)
    sparse.train()(input_ids=IDS, labels=IDS).loss.backward()
    card = ModelCard.load(out / "README.md")
    assert card.data.tags == ["mixora", "pesc"] and "16 modules are adapted" in card.text
    assert any("mlp.mixora_B" in name and g.any() for name, g in gradients(sparse).items())


def test_the_seed_decides_the_experts(bases, tmp_path):  # noqa: F811
    found = []
    for number, seed in enumerate((0, 0, 1)):
        words = ["--out", tmp_path / str(number), "--seed", seed, "--json", *SMALL]
        result = call("craft", "--model", bases / "llama", *words)
        assert len(json.loads(result.output)["sites"]) == 16
        found.append((tmp_path / str(number) / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_an_encoder_decoder_and_another_recipe(bases, tmp_path):  # noqa: F811
    config = mixora.recipe("pesc", num_experts=4, rank=3)
    plan = mixora.craft(bases / "t5", tmp_path / "t5", config)
    assert (config.task_type, config.plan) == (None, None)
    assert sum(site.expert == "bottleneck" for site in plan.sites) == 4
    assert json.loads((tmp_path / "t5" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    assert call("craft", "--recipe", "sira", "--model", bases / "llama", "--out", tmp_path / "x").exit_code == 0
    words = ["--model", bases / "bert", "--out", tmp_path / "b", "model.task=sequence-classification"]
    assert call("craft", *words, *SMALL).exit_code == 0
    assert isinstance(mixora.from_pretrained(bases / "bert", tmp_path / "b", num_labels=2), PeftModel)


def test_a_folder_that_holds_something_is_left_alone(bases, tmp_path):  # noqa: F811
    (tmp_path / "note.txt").write_text("mine")
    result = call("craft", "--model", bases / "llama", "--out", tmp_path)
    assert result.exit_code == 2 and "is not empty; valid: a folder that is new or empty" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["note.txt"]


def test_a_folder_that_cannot_be_made_is_named(bases, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: .*file/inside cannot be written"):
        mixora.craft(bases / "llama", tmp_path / "file" / "inside")
