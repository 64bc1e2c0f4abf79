"""PEFT's own doors: each gives the logits of the adapter alone, to the bit."""

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    PeftMixedModel,
    PeftModel,
    get_peft_model,
)

import mixora
from tests.compatibility.adapters import ADAPTERS, PLAIN, logits
from tests.models import adapt, tiny_bert_classifier, tiny_llama

OURS = [name for name, config in ADAPTERS.items() if config is not PLAIN]


@pytest.fixture
def several(folder):
    """Adapters of three recipes on one base, the first of them active."""
    model = PeftModel.from_pretrained(tiny_llama(), folder / OURS[0], adapter_name=OURS[0])
    for name in OURS[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    return model


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


@pytest.mark.works_with("PEFT", "several adapters of different recipes: switched, disabled, deleted")
def test_adapters_of_different_recipes_are_switched_disabled_and_deleted(several, alone):
    for name in (*OURS, *reversed(OURS)):
        several.set_adapter(name)
        assert torch.equal(logits(several), alone[name])
        with several.disable_adapter():
            assert torch.equal(logits(several), alone[None])
    several.delete_adapter("pesc")
    for name in ("adamix", "sira"):
        several.set_adapter(name)
        assert torch.equal(logits(several), alone[name])
    assert torch.equal(logits(several.unload()), alone[None])


@pytest.mark.works_with("PEFT", "several adapters: deleting the active one leaves another")
def test_deleting_the_active_adapter_leaves_another(several, alone):
    several.set_adapter("adamix")
    with pytest.warns(UserWarning, match="adapter 'adamix' was active; now 'sira' is"):
        several.delete_adapter("adamix")
    assert several.active_adapters == ["sira"]
    assert torch.equal(logits(several), alone["sira"])


@pytest.mark.works_with("PEFT", "several adapters: saving those that are selected")
def test_selected_adapters_are_saved_as_if_alone(several, alone, tmp_path):
    several.save_pretrained(tmp_path, selected_adapters=["pesc", "adamix"])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"pesc", "adamix"}
    for name in ("pesc", "adamix"):
        assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path / name)), alone[name])


@pytest.mark.works_with("PEFT", "training one of several adapters")
def test_one_of_several_adapters_is_trained(several, alone):
    several.set_adapter("pesc")
    trained = {name: p for name, p in several.named_parameters() if p.requires_grad}
    assert all(name.endswith(".pesc") for name in trained)
    optimiser = torch.optim.SGD(trained.values(), lr=0.5)
    ids = torch.arange(3, 11)[None]
    several.train()(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    assert not torch.equal(logits(several), alone["pesc"])
    for name in ("adamix", "sira"):
        several.set_adapter(name)
        assert torch.equal(logits(several), alone[name])


def test_a_peft_model_refuses_adapters_of_two_types(several, folder):
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        several.load_adapter(folder / "plain", adapter_name="plain")
    plain = PeftModel.from_pretrained(tiny_llama(), folder / "plain")
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        plain.add_adapter("sira", ADAPTERS["sira"])


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_a_mixed_model_refuses_the_type():
    with pytest.raises(ValueError, match="'MIXORA' is not compatible with the `PeftMixedModel`"):
        get_peft_model(tiny_llama(), ADAPTERS["sira"], mixed=True)
    plain = get_peft_model(tiny_llama(), PLAIN, mixed=True)
    assert isinstance(plain, PeftMixedModel)
    with pytest.raises(ValueError, match="'MIXORA' is not compatible with the `PeftMixedModel`"):
        plain.add_adapter("sira", ADAPTERS["sira"])
