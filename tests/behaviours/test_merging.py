"""Merged into the weights where a recipe can be; where it cannot, one error, and no weight has changed."""

import copy

import pytest
import torch
from safetensors.torch import load_file

import mixora
from mixora.errors import MixoraError
from mixora.mixture import Mixture, mixtures_of
from tests.behaviours.cases import (
    CAN_MERGE,
    CANNOT_MERGE,
    KINDS,
    RECIPES,
    add,
    base,
    config,
    each_kind,
    each_mergeable,
    logits,
    near,
    of_base,
    plain_logits,
    same,
    wrap,
)
from tests.models import adapt, tiny_gpt2


def test_the_table_has_every_recipe():
    assert set(CANNOT_MERGE) | set(CAN_MERGE) == set(RECIPES)
    assert not set(CANNOT_MERGE) & set(CAN_MERGE)


@each_kind
@each_mergeable
def test_merged_it_computes_the_same_and_unmerging_restores(recipe, kind):
    everywhere = {"targets": ["all-linear"]} if recipe == "lora" else {}
    model = wrap(recipe, kind, **everywhere)
    expected, plain = logits(model, kind), plain_logits(kind)
    assert not same(expected, plain)
    model.merge_adapter()
    assert all(module.merged_adapters == ["default"] for module in mixtures_of(model))
    near(logits(model, kind), expected)
    model.unmerge_adapter()
    assert not any(module.merged for module in mixtures_of(model))
    near(logits(model, kind), expected)
    with model.disable_adapter():
        near(logits(model, kind), plain)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, Mixture) for module in merged.modules())
    assert not hasattr(merged, "peft_config")
    near(logits(merged, kind), expected)


@each_mergeable
def test_a_merged_base_is_saved_like_any_model(recipe, tmp_path):
    model = wrap(recipe)
    expected = logits(model)
    merged = model.merge_and_unload(progressbar=False)
    merged.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == base().state_dict().keys()
    near(logits(type(merged).from_pretrained(tmp_path)), expected)


@each_mergeable
def test_disabling_a_merged_adapter_gives_the_base(recipe):
    model = wrap(recipe)
    expected = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        near(logits(model), plain_logits())
    near(logits(model), expected)


@each_mergeable
def test_merging_twice_changes_nothing_more(recipe):
    model = wrap(recipe)
    model.merge_adapter()
    before = of_base(model)
    model.merge_adapter()
    assert all(same(tensor, before[key]) for key, tensor in of_base(model).items())


@each_mergeable
def test_one_of_two_both_or_the_active_one_is_merged(recipe):
    model = add(wrap(recipe, adapter_name="one"), "two", recipe)
    alone = {}
    for name in ("one", "two"):
        model.set_adapter(name)
        alone[name] = logits(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    for names, expected in ((["one"], alone["one"]), (["two"], alone["two"]), (None, both), (["two", "one"], both)):
        near(logits(copy.deepcopy(model).merge_and_unload(adapter_names=names)), expected)
    model.set_adapter("one")
    model.merge_adapter(["two"])
    assert model.get_model_status().merged_adapters == ["two"]
    near(logits(model), alone["two"])
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("one")
    near(logits(model), alone["one"])


@each_mergeable
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_not_merged_safely(recipe, value):
    model = wrap(recipe)
    before = of_base(model)
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if "mixora_B" in key).fill_(value)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(MixoraError, match="not finite"):
            merge(safe_merge=True)
        assert all(same(tensor, before[key]) for key, tensor in of_base(model).items())


@each_mergeable
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_low_precision(recipe, dtype):
    model = wrap(recipe).to(dtype)
    expected = logits(model).float()
    merged = model.merge_and_unload()
    assert {p.dtype for p in merged.parameters()} == {dtype}
    torch.testing.assert_close(logits(merged).float(), expected, rtol=0.1, atol=0.05)


@pytest.mark.parametrize("targets", [["c_attn", "mlp.c_proj", "c_fc"], ["attn.c_proj"]])
def test_weights_that_stand_transposed(targets):
    """GPT-2's linears."""
    model = adapt(tiny_gpt2(), mixora.recipe("lora", targets=targets)).eval()
    expected = logits(model)
    model.merge_adapter()
    near(logits(model), expected)
    model.unmerge_adapter()
    near(logits(model), expected)
    near(logits(model.merge_and_unload()), expected)


def assert_refuses(model, merge, message):
    before = of_base(model)
    with pytest.raises(MixoraError, match=f"cannot be merged: {message}.*valid: "):
        merge()
    assert all(same(tensor, before[key]) for key, tensor in of_base(model).items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("recipe", CANNOT_MERGE)
def test_what_cannot_be_merged_says_so_and_changes_nothing(recipe, kind):
    model = wrap(recipe, kind)
    expected = logits(model, kind)
    for merge in (model.merge_adapter, model.merge_and_unload):
        assert_refuses(model, merge, CANNOT_MERGE[recipe])
    assert same(logits(model, kind), expected)


@pytest.mark.parametrize("recipe", CANNOT_MERGE)
def test_one_among_those_named_that_cannot_be_merged(recipe):
    model = wrap("lora", adapter_name="plain")
    model.add_adapter("other", config(recipe))
    for method in ("merge_adapter", "merge_and_unload"):
        merge = getattr(model, method)
        assert_refuses(model, lambda merge=merge: merge(adapter_names=["plain", "other"]), CANNOT_MERGE[recipe])


@pytest.mark.filterwarnings("ignore:Model (has|with) `tie_word_embeddings=True`")
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_a_head_that_shares_its_weight_with_the_embeddings(targets):
    """In a sum with their weight the head's change would act on the inputs too."""
    model = adapt(base(tie_word_embeddings=True), mixora.recipe("lora", targets=targets)).eval()
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        assert_refuses(model, merge, "shares its weight with model.embed_tokens")
    assert same(logits(model), expected)


def test_a_tied_model_whose_head_is_left_alone_can_be_merged():
    model = adapt(base(tie_word_embeddings=True), config("lora")).eval()
    expected = logits(model)
    near(logits(model.merge_and_unload()), expected)
