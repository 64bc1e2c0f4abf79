"""Adapters through transformers alone, and its pipelines: the logits of the adapter alone, to the bit."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, pipeline

import mixora
from tests import versions
from tests.characters import build_tokenizer
from tests.compatibility.adapters import ADAPTERS, logits
from tests.models import adapt, fill, tiny_bert_classifier, tiny_llama

OURS = ["sira", "adamix", "pesc"]
again = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")


@versions.native
@pytest.mark.works_with("transformers", "`load_adapter`, `disable_adapters`, `enable_adapters`")
@pytest.mark.parametrize("name", OURS)
def test_an_adapter_is_loaded_disabled_and_enabled(folder, alone, name):
    model = tiny_llama()
    model.load_adapter(str(folder / name), adapter_name="mine")
    assert model.active_adapters() == ["mine"]
    assert torch.equal(logits(model), alone[name])
    model.disable_adapters()
    assert torch.equal(logits(model), alone[None])
    model.enable_adapters()
    assert torch.equal(logits(model), alone[name])


@versions.native
@pytest.mark.works_with("transformers", "`AutoModelForCausalLM.from_pretrained` of an adapter's folder")
@pytest.mark.parametrize("name", OURS)
def test_an_automatic_class_loads_an_adapter(folder, alone, name):
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder / name)), alone[name])


@again
@versions.native
@pytest.mark.works_with("transformers", "several adapters: `load_adapter`, `set_adapter`, `delete_adapter`")
def test_adapters_are_switched_and_deleted(folder, alone):
    model = tiny_llama()
    for name in ("sira", "adamix"):
        model.load_adapter(str(folder / name), adapter_name=name)
    for name in ("sira", "adamix", "sira"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(logits(model), alone[name])
    with pytest.warns(UserWarning, match="adapter 'sira' was active; now 'adamix' is"):
        model.delete_adapter("sira")
    assert torch.equal(logits(model), alone["adamix"])
    model.delete_adapter("adamix")
    assert torch.equal(logits(model), alone[None])


@versions.native
@pytest.mark.works_with("transformers", "`add_adapter`, training, `save_pretrained`")
@pytest.mark.parametrize("name", OURS[:1] + OURS[2:])
def test_a_new_adapter_is_trained_and_saved(folder, name, tmp_path):
    model = tiny_llama()
    model.add_adapter(ADAPTERS[name], adapter_name="mine")
    fill(model)
    before = logits(model)
    ids = torch.arange(3, 11)[None]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all("mixora_" in name for name, p in model.named_parameters() if p.requires_grad)
    optimiser = torch.optim.SGD(trained, lr=0.5)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    after = logits(model)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), after)
    other = tiny_llama()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other), after)


@again
@versions.native
@pytest.mark.works_with("transformers", "beside a plain LoRA adapter: switching, saving ours, deleting")
@pytest.mark.parametrize("order", [("sira", "plain"), ("plain", "sira"), ("plain", "pesc")])
def test_beside_a_plain_lora(folder, alone, order, tmp_path):
    """Where our layer stands around LoRA's, kernel `joint` cannot read the frozen weight: equal to rounding."""
    model = tiny_llama()
    for name in order:
        model.load_adapter(str(folder / name), adapter_name=name)
    model.double()
    exact = {name: logits(PeftModel.from_pretrained(tiny_llama(), folder / name).double()) for name in order}
    for name in (*order, order[0]):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), exact[name], rtol=0, atol=1e-12)
    (ours,) = {*order} - {"plain"}
    model.set_adapter(ours)
    model.float().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path)), alone[ours])
    model.double().delete_adapter("plain")
    torch.testing.assert_close(logits(model), exact[ours], rtol=0, atol=1e-12)


@pytest.fixture
def tokenizer():
    """One token per character; ids stay below the tiny models' vocabulary of 64."""
    return build_tokenizer()


@pytest.mark.works_with("transformers", "`pipeline` for `text-generation`")
@pytest.mark.parametrize("name", OURS)
def test_a_pipeline_generates(folder, tokenizer, name):
    model = PeftModel.from_pretrained(tiny_llama(), folder / name).eval()
    write = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    texts = ["(1 + 2)", "12"]
    settings = {"max_new_tokens": 6, "do_sample": False}
    found = write(texts, return_tensors=True, **settings)
    for text, (written,) in zip(texts, found, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        assert inputs["input_ids"].max() < 64
        expected = model.generate(**inputs, **settings, pad_token_id=0)[0]
        assert written["generated_token_ids"] == expected.tolist()


@pytest.mark.works_with("transformers", "`pipeline` for `text-classification`")
@pytest.mark.parametrize("name", OURS)
def test_a_pipeline_classifies(tokenizer, name):
    config = mixora.recipe(name, num_experts=4, rank=2, task_type="SEQ_CLS")
    model = adapt(tiny_bert_classifier(), config).eval()
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu", top_k=None)
    texts = ["(1 + 2) * 3", "12"]
    for text, scores in zip(texts, classify(texts, batch_size=2), strict=True):
        with torch.no_grad():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        found = {line["label"]: line["score"] for line in scores}
        assert found == pytest.approx({f"LABEL_{n}": p for n, p in enumerate(expected.tolist())}, abs=1e-5)
