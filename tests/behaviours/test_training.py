"""Training: only the adapter changes, every tensor of it learns, with recomputation and in low precision too."""

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training

import mixora
from mixora.errors import TrainingError
from tests.behaviours.cases import (
    CANNOT_RECOMPUTE_REENTRANTLY,
    CANNOT_TRAIN_BY_ONE_PASS,
    add,
    base,
    batch,
    config,
    each_kind,
    each_recipe,
    load,
    logits,
    of_adapters,
    of_base,
    plain_logits,
    same,
    train,
    wrap,
)
from tests.models import gradients


def drawn(recipe, name):
    """Whether a tensor belongs to an expert that a pass may leave out, and its optimiser with it."""
    return recipe in CANNOT_TRAIN_BY_ONE_PASS and name.split(".")[-2][-1].isdigit()


def evaluate(model, kind):
    with torch.no_grad():
        return float(model.eval()(**batch(kind)).loss)


@each_kind
@each_recipe
def test_steps_change_the_adapter_alone_and_lower_the_loss(recipe, kind):
    model = wrap(recipe, kind)
    frozen, before = of_base(model), {key: p.detach().clone() for key, p in of_adapters(model).items()}
    loss, _ = mixora.compute_loss(model.train(), batch(kind))
    loss.backward()
    found = gradients(model)
    missing = of_adapters(model).keys() - found.keys()
    assert found.keys() <= of_adapters(model).keys()
    assert all(drawn(recipe, name) for name in missing)
    assert all(gradient.any() for gradient in found.values())
    train(model, kind, steps=2)
    changed = {key for key, p in of_adapters(model).items() if not same(p, before[key])}
    assert all(drawn(recipe, key) for key in before.keys() - changed)
    assert all(same(tensor, frozen[key]) for key, tensor in of_base(model).items())
    # from the start that a method prescribes
    started = get_peft_model(base(kind), config(recipe, kind))
    first = evaluate(started, kind)
    train(started, kind, steps=2)
    assert evaluate(started, kind) < first


@pytest.mark.works_with("PEFT", "training one of several adapters")
@each_recipe
def test_one_of_several_adapters_is_trained(recipe):
    model = add(wrap(recipe), "idle", recipe)
    idle = {key: p.detach().clone() for key, p in of_adapters(model, "idle").items()}
    before = logits(model)
    train(model)
    assert not same(logits(model), before)
    assert all(same(p, idle[key]) for key, p in of_adapters(model, "idle").items())


@each_recipe
def test_a_plain_pass_trains_or_says_why_not(recipe):
    model = wrap(recipe).train()
    if recipe in CANNOT_TRAIN_BY_ONE_PASS:
        with pytest.raises(TrainingError, match=CANNOT_TRAIN_BY_ONE_PASS[recipe]):
            model(**batch())
        return
    model(**batch()).loss.backward()
    assert gradients(model).keys() == of_adapters(model).keys()


@each_recipe
def test_recomputation_gives_the_same_gradients_or_is_refused(recipe):
    expected = recomputed(recipe)
    assert expected.keys() <= of_adapters(wrap(recipe)).keys()
    for use_reentrant in (False, True):
        if use_reentrant and recipe in CANNOT_RECOMPUTE_REENTRANTLY:
            with pytest.raises(TrainingError, match=CANNOT_RECOMPUTE_REENTRANTLY[recipe]):
                recomputed(recipe, use_reentrant)
            continue
        found = recomputed(recipe, use_reentrant)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=lambda m, n=name: f"{n}: {m}")


def recomputed(recipe, use_reentrant=None):
    """The gradients of one batch, with activation checkpointing of that kind; without any for None."""
    model = wrap(recipe).train()
    if use_reentrant is not None:
        # makes the embeddings' output require a gradient
        model.prepare_model_for_gradient_checkpointing(model)
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    torch.manual_seed(2)
    mixora.compute_loss(model, batch())[0].backward()
    return gradients(model)


@each_recipe
def test_a_base_that_was_prepared_for_low_bits(recipe):
    plain = base()
    # what transformers sets where it quantises
    plain.is_loaded_in_4bit = True
    plain = prepare_model_for_kbit_training(plain, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert not any(p.requires_grad for p in plain.parameters())
    assert plain.is_gradient_checkpointing
    model = get_peft_model(plain, config(recipe))
    assert model.get_input_embeddings()(batch()["input_ids"]).requires_grad
    train(model)
    assert not same(logits(model), plain_logits())


@each_kind
def test_inputs_require_gradients_where_asked(kind):
    model = wrap("sira", kind)
    ids = batch(kind)["input_ids"]
    assert not model.get_input_embeddings()(ids).requires_grad
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(ids).requires_grad
    model.disable_input_require_grads()
    assert not model.get_input_embeddings()(ids).requires_grad


@pytest.mark.parametrize(("dtype", "is_fp32"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float16, True)])
@each_recipe
def test_a_base_in_low_precision_trains(recipe, dtype, is_fp32):
    model = get_peft_model(base().to(dtype), config(recipe), autocast_adapter_dtype=is_fp32)
    experts = {p.dtype for key, p in of_adapters(model).items() if "router" not in key}
    assert experts == {torch.float32 if is_fp32 else dtype}
    assert {p.dtype for key, p in of_adapters(model).items() if "router" in key} <= {torch.float32}
    before = {key: p.detach().clone() for key, p in of_adapters(model).items()}
    step(model)
    assert all(torch.isfinite(p).all() for p in of_adapters(model).values())
    assert any(not same(p, before[key]) for key, p in of_adapters(model).items())
    assert logits(model).dtype == dtype
    # what is added later follows the same rule
    model.add_adapter("later", config(recipe), autocast_adapter_dtype=is_fp32)
    later = {p.dtype for key, p in of_adapters(model, "later").items() if "router" not in key}
    assert later == experts


@each_recipe
def test_training_goes_on_after_files_as_without(recipe, tmp_path):
    """Two steps in one go, and one before and one behind a file; the optimiser has no memory."""
    through, restarted = wrap(recipe), wrap(recipe)
    for model in (through, restarted):
        step(model, seed=1)
    restarted.save_pretrained(tmp_path)
    again = load(tmp_path, is_trainable=True)
    for model in (through, again):
        step(model, seed=2)
    assert all(same(p, of_adapters(through)[key]) for key, p in of_adapters(again).items())
    assert same(logits(again), logits(through))


def step(model, seed=0):
    torch.manual_seed(seed)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    mixora.compute_loss(model.train(), batch())[0].backward()
    optimiser.step()
    model.zero_grad()
    model.eval()
