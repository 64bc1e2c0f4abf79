"""Copies are equal and independent; hooks of others, and what they hang on, stay as they were."""

import copy
import gc
import weakref

import torch
from peft import get_peft_model

import mixora
from mixora.mixture import mixtures_of
from tests.behaviours.cases import (
    IDS,
    RECIPES,
    base,
    config,
    each_kind,
    each_recipe,
    logits,
    same,
    train,
    wrap,
)
from tests.models import fill


@each_kind
@each_recipe
def test_a_copy_after_a_training_step_is_independent(recipe, kind):
    model = wrap(recipe, kind)
    train(model, kind)
    twin = copy.deepcopy(model)
    before = logits(model, kind)
    assert same(logits(twin, kind), before)
    fill(twin, seed=4)
    assert same(logits(model, kind), before)
    assert not same(logits(twin, kind), before)
    # sites of the copy lead each other
    of_twin = set(mixtures_of(twin))
    for module in of_twin:
        for parts in module.parts.values():
            assert {*parts.leader, *parts.kin} <= of_twin
    # and hooks of the copy belong to the copy
    twin.unload()
    assert model.get_base_model()._forward_pre_hooks
    assert same(logits(model, kind), before)


@each_recipe
def test_a_copy_by_its_state_computes_the_same(recipe):
    model = wrap(recipe)
    twin = get_peft_model(base(), config(recipe))
    assert twin.state_dict().keys() == model.state_dict().keys()
    twin.load_state_dict(model.state_dict())
    assert same(logits(twin), logits(model))


@each_recipe
def test_a_copy_sees_its_own_padding(recipe):
    model = wrap(recipe)
    twin = copy.deepcopy(model)
    mask = torch.tensor([[1] * 6] * 3 + [[1] * 3 + [0] * 3])
    for one in (twin, model):
        with mixora.passes.tracing() as trace, torch.no_grad():
            one(IDS, mask)
        assert {int(o.routing.valid_T.sum()) for o in trace.observations} == {21}


def test_nothing_holds_models_that_are_gone():
    gone = []
    for recipe in RECIPES:
        model = wrap(recipe)
        train(model)
        logits(model)
        gone.append(weakref.ref(model.get_base_model().model.layers[0]))
    del model
    gc.collect()
    assert [recipe for recipe, layer in zip(RECIPES, gone, strict=True) if layer() is not None] == []


@each_recipe
def test_hooks_of_others_are_called_and_may_change_what_passes(recipe):
    model = wrap(recipe).double()
    layer = mixtures_of(model)[0]
    expected, seen = logits(model), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: seen.append(("before", args[0].shape))),
        layer.register_forward_hook(lambda module, args, output: seen.append(("behind", output.shape))),
        layer.base_layer.register_forward_hook(lambda module, args, output: seen.append(("frozen", output.shape))),
    ]
    assert same_to_rounding(logits(model), expected)
    assert [what for what, _ in seen].count("before") == [what for what, _ in seen].count("behind") >= 1
    assert "frozen" in [what for what, _ in seen]
    for handle in handles:
        handle.remove()
    with_zeros = layer.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert not same(logits(model), expected)
    with_zeros.remove()
    assert same(logits(model), expected)


def same_to_rounding(found, expected):
    """A hook on the frozen module keeps kernel `joint` from computing it; sharp attention makes rounding grow."""
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)
    return True


@each_recipe
def test_backward_hooks_see_gradients(recipe):
    """torch hands a module with such a hook a view of its input in place of the input."""
    model, seen = wrap(recipe), []
    model.enable_input_require_grads()
    for layer in mixtures_of(model):
        layer.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_out[0].shape))
    inputs = {"input_ids": IDS, "labels": IDS}
    mixora.compute_loss(model.train(), inputs)[0].backward()
    assert len(seen) >= len(mixtures_of(model))


@each_recipe
def test_hooks_on_the_base_are_there_after_unloading(recipe):
    plain, seen = base(), []
    plain.register_forward_hook(lambda module, args, output: seen.append("model"))
    plain.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append("part"))
    plain.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, output: seen.append("linear"))
    model = get_peft_model(plain, config(recipe))
    logits(model)
    assert {"model", "part", "linear"} <= set(seen)
    seen.clear()
    unloaded = model.unload()
    assert len(unloaded._forward_hooks) == 1
    logits(unloaded)
    assert sorted(seen) == ["linear", "model", "part"]
