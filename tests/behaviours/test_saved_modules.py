"""Modules that are trained and saved whole beside the adapter: PEFT's `modules_to_save`, and tied weights."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file

import mixora
from mixora.errors import CheckpointError, ConfigError
from mixora.loading import add_pretrained
from tests.behaviours.cases import (
    IDS,
    add,
    base,
    config,
    each_recipe,
    load,
    logits,
    of_adapters,
    plain_logits,
    same,
    train,
    wrap,
)
from tests.models import adapt, tiny_answerer, tiny_bert_classifier, tiny_llama, tiny_roberta_classifier


def change(model, name="default", factor=2.0):
    """The saved copy of each head that belongs to an adapter, multiplied."""
    with torch.no_grad():
        for key, p in of_adapters(model, name).items():
            if "modules_to_save" in key:
                p.mul_(factor)
    return model


@each_recipe
def test_a_head_is_trained_saved_and_restored(recipe, tmp_path):
    model = wrap(recipe, "encoder")
    head = model.get_base_model().classifier
    assert isinstance(head, ModulesToSaveWrapper)
    before = head.modules_to_save["default"].weight.detach().clone()
    original = head.original_module.weight.detach().clone()
    train(model, "encoder")
    assert not same(head.modules_to_save["default"].weight, before)
    assert same(head.original_module.weight, original)
    model.save_pretrained(tmp_path)
    again = load(tmp_path, "encoder", adapter_name="other")
    assert same(
        again.get_base_model().classifier.modules_to_save["other"].weight, head.modules_to_save["default"].weight
    )
    assert same(logits(again, "encoder"), logits(model, "encoder"))


def test_a_head_that_the_file_lacks_is_named_and_the_base_stays_as_it_was(tmp_path):
    settings = {"task_type": "CAUSAL_LM", "num_experts": 4, "top_k": 2}
    model = get_peft_model(tiny_llama(), mixora.recipe("sira", modules_to_save=["lm_head"], **settings))
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    names, plain = set(model.state_dict()), tiny_llama()
    with pytest.raises(CheckpointError, match=r"model\.lm_head\.weight: missing, expected \[64, 32\]"):
        mixora.from_pretrained(plain, tmp_path)
    assert set(plain.state_dict()) == set(tiny_llama().state_dict())
    with pytest.raises(CheckpointError, match=r"model\.lm_head\.weight: missing, expected \[64, 32\]"):
        add_pretrained(model, tmp_path, "second")
    assert set(model.state_dict()) == names


@each_recipe
def test_each_adapter_has_a_copy_of_its_own(recipe, tmp_path):
    model = wrap(recipe, "encoder", adapter_name="one")
    change(add(model, "two", recipe, "encoder"), "two")
    found = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        found[name] = logits(model, "encoder")
        other = {"one": "two", "two": "one"}[name]
        assert all(p.requires_grad for p in of_adapters(model, name).values())
        assert not any(p.requires_grad for p in of_adapters(model, other).values())
    assert not same(found["one"], found["two"])
    with model.disable_adapter():
        assert same(logits(model, "encoder"), plain_logits("encoder"))
    model.save_pretrained(tmp_path)
    for name, expected in found.items():
        assert same(logits(load(tmp_path / name, "encoder"), "encoder"), expected)
    model.set_adapter("one")
    model.delete_adapter("two")
    assert same(logits(model, "encoder"), found["one"])
    assert list(model.get_base_model().classifier.modules_to_save) == ["one"]


@each_recipe
def test_any_module_by_name_is_saved(recipe, tmp_path):
    model = change(wrap(recipe, modules_to_save=["lm_head", "norm"]))
    expected = logits(model)
    assert not same(expected, logits(wrap(recipe)))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert same(logits(again), expected)
    assert again.modules_to_save == {"lm_head", "norm"}
    with model.disable_adapter():
        assert same(logits(model), plain_logits())


@pytest.mark.parametrize(
    ("make", "saved"), [(tiny_roberta_classifier, ["classifier"]), (tiny_bert_classifier, ["pooler", "classifier"])]
)
def test_modules_of_several_layers_are_unloaded(make, saved):
    """They have no weight of their own, for which PEFT asks."""
    model = change(adapt(make(), mixora.recipe("lora", modules_to_save=saved))).eval()
    expected = model(IDS).logits.detach()
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, expected)
    assert merged.state_dict().keys() == make().state_dict().keys()


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_one_of_two_tied_modules_may_be_saved(name, tmp_path):
    """PEFT unties them in training and says so; the file holds the one that was trained."""
    model = change(get_peft_model(base(tie_word_embeddings=True), config("sira", modules_to_save=[name])))
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(tie_word_embeddings=True), tmp_path)
    assert same(logits(again), logits(model))
    assert not same(logits(again), logits(base(tie_word_embeddings=True)))


@each_recipe
def test_a_module_cannot_be_both_adapted_and_saved_whole(recipe):
    name = mixora.plan(base(), config(recipe)).sites[0].path.rpartition(".")[2]
    with pytest.raises(ConfigError, match=rf"{name}: is adapted by a rule and trained whole by modules_to_save"):
        wrap(recipe, modules_to_save=[name])


INSIDE = [
    (tiny_roberta_classifier, "SEQ_CLS", ["query", "dense"], None),
    (tiny_roberta_classifier, None, ["query", "dense"], ["classifier"]),
    (tiny_roberta_classifier, "TOKEN_CLS", r".*(query|dense)", None),
    (tiny_llama, "CAUSAL_LM", ["q_proj", "up_proj"], ["layers.1.self_attn", "embed_tokens"]),
]


@pytest.mark.parametrize(("make", "task_type", "targets", "saved"), INSIDE)
def test_nothing_is_adapted_inside_of_a_module_that_is_saved_whole(make, task_type, targets, saved, tmp_path):
    """As with PEFT's LoRA. A copy of the module would hold the adapter, which no file has a place for."""
    # for TOKEN_CLS, PEFT adds the head only after it has placed its LoRA
    theirs = get_peft_model(make(), LoraConfig(target_modules=targets, modules_to_save=saved or ["classifier"]))
    expected = {path.removeprefix("base_model.model.") for path in theirs.targeted_module_names}
    ours = mixora.recipe("lora", targets=targets, rank=2, task_type=task_type, modules_to_save=saved)
    assert {site.path for site in mixora.plan(make(), ours).sites} == expected
    model = change(adapt(make(), ours)).eval()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make(), tmp_path).eval()
    assert same(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("task_type", "head"), [("TOKEN_CLS", "classifier"), ("QUESTION_ANS", "qa_outputs")])
def test_heads_that_peft_adds_late_are_saved_too(task_type, head):
    model = get_peft_model(tiny_answerer(), mixora.recipe("lora", task_type=task_type))
    assert head in model.peft_config["default"].modules_to_save


REFUSED = [
    (tiny_roberta_classifier, "SEQ_CLS", ["query", "classifier.dense"], None, "classifier.dense", "classifier"),
    (tiny_llama, "CAUSAL_LM", ["attention", "up_proj"], ["self_attn"], "model.layers.0.self_attn.q_proj", "self_attn"),
    (tiny_answerer, "QUESTION_ANS", ["query", "qa_outputs"], None, "qa_outputs", "qa_outputs"),
]


@pytest.mark.parametrize(("make", "task_type", "targets", "saved", "path", "name"), REFUSED)
def test_a_target_that_reaches_nothing_else_is_an_error(make, task_type, targets, saved, path, name):
    config = mixora.recipe("lora", targets=targets, task_type=task_type, modules_to_save=saved)
    with pytest.raises(ConfigError, match=rf"^{path}: is adapted by a rule and trained whole by .* '{name}'$"):
        get_peft_model(make(), config)


def test_an_allocation_knows_what_is_saved_whole():
    settings = {"modules_to_save": ["layers.1.self_attn"], "allocator.kind": "proportional"}
    allocated = mixora.allocate(tiny_llama(), mixora.recipe("lora", **settings))
    assert {path.partition(".self_attn")[0] for path in allocated.allocation} == {"model.layers.0"}
    assert mixora.allocate(tiny_llama(), allocated).allocation == allocated.allocation
