"""Sites that a model never computes, or reads past their modules, are told of once the first step has been made."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import MambaConfig, MambaForCausalLM, TrainingArguments

import mixora
from tests.models import tiny_llama
from tests.training.setups import collate, dataset


def train(model, folder, recipe="sira", **overrides):
    settings = {"num_experts": 2, "top_k": 1, "rank": 2} if recipe == "sira" else {}
    adapter = mixora.recipe(recipe, task_type="CAUSAL_LM", **settings, **overrides)
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, report_to=[], use_cpu=True
    )
    trainer = mixora.Trainer(get_peft_model(model, adapter), arguments, train_dataset=dataset(), data_collator=collate)
    trainer.train()
    return trainer.idle_sites.note


def test_weights_that_are_read_past_their_modules(tmp_path, caplog):
    torch.manual_seed(0)
    mamba = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))
    note = train(mamba, tmp_path, targets=["all-linear"])
    assert note.startswith(
        "2 of 8 sites got no gradient in the first step (layer 0 mixer.dt_proj, layer 1 mixer.dt_proj): the model"
    )
    assert [record.message for record in caplog.records if "no gradient" in record.message] == [note]


def test_a_part_that_is_not_called(tmp_path):
    model = tiny_llama()
    model.tower = nn.Linear(4, 4)
    assert "1 of 3 sites got no gradient in the first step (tower)" in train(
        model, tmp_path, targets=["tower", "q_proj"]
    )


@pytest.mark.parametrize("recipe", ["sira", "pesc", "adamix", "lora", "mixlora"])
def test_nothing_to_tell(recipe, tmp_path):
    assert train(tiny_llama(), tmp_path, recipe) is None
