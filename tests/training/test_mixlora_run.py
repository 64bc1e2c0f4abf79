"""Training with `mixlora`: the router of each feed-forward part gets the intended gradient, once; a whole run."""

import json

import pytest
import transformers
from peft import get_peft_model
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from tests.training.setups import make_model, make_trainer

CHECKPOINTING = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
SMALL = ["adapter.num_experts=4", "adapter.rank=4", "train.steps=3", "train.batch_size=4", "evaluate.limit=4"]


@pytest.mark.parametrize(
    ("trainer_class", "changes"),
    [
        (mixora.Trainer, {"gradient_accumulation_steps": 4}),
        (mixora.Trainer, CHECKPOINTING),
        (mixora.SFTTrainer, {}),
        (transformers.Trainer, {"gradient_accumulation_steps": 4}),
    ],
)
def test_routers_receive_the_intended_gradient(trainer_class, changes, tmp_path):
    settings = {"num_experts": 4, "rules.ffn.expert.rank": 2, "losses.load_balance.coefficient": 0.5}
    model = get_peft_model(make_model().unload(), mixora.recipe("mixlora", task_type="CAUSAL_LM", **settings))
    callbacks = [mixora.AuxiliaryLossCallback()] if trainer_class is transformers.Trainer else []
    trainer = make_trainer(trainer_class, tmp_path, model=model, callbacks=callbacks, **changes)
    found = mixora.check_router_gradient(trainer)
    assert found.is_right, str(found)


def test_a_run(bases, data, tmp_path):
    out = tmp_path / "out"
    words = ["train", "--recipe", "mixlora", "--model", bases / "llama", "--data", data / "commands", "--out", out]
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--json", *SMALL, "evaluate.max_new_tokens=3")])
    assert result.exit_code == 0, result.output
    record = json.loads(result.output)
    assert record["reloaded"] == {name: record["after"][name] for name in record["reloaded"]}
    routed = [site["path"] for site in record["routing"]]
    assert routed == [f"model.layers.{layer}.mlp.gate_proj" for layer in range(2)]
