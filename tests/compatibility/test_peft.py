"""PEFT's own doors: each gives the logits of the adapter alone, to the bit."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
)

import mixora
from tests.compatibility.adapters import ADAPTERS, PLAIN, logits
from tests.models import adapt, tiny_bert_classifier

OURS = [name for name, config in ADAPTERS.items() if config is not PLAIN]


@pytest.mark.works_with("PEFT", "`AutoPeftModelForCausalLM`")
@pytest.mark.parametrize("name", OURS)
def test_the_automatic_class_finds_base_and_adapter(folder, alone, name):
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder / name)), alone[name])


@pytest.mark.works_with("PEFT", "`AutoPeftModelForSequenceClassification`")
def test_the_automatic_class_of_classifiers(tmp_path):
    base = tiny_bert_classifier()
    base.save_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = str(tmp_path / "base")
    model = adapt(base, mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    again = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert torch.equal(logits(again), logits(model))
