"""`losses.consistency.recompute`: the gradients of the ordinary step, with the activations of one pass at a time."""

import weakref

import pytest
import torch
from peft import get_peft_model
from torch import nn

import mixora
from mixora.errors import ConfigError
from tests.models import fill, gradients, tiny_bert_classifier, tiny_llama, tiny_t5, token_ids
from tests.training.setups import accumulated_batches, make_trainer
from tests.training.test_consistency import Catch, alternating, expected_gradients, make_model

__all__ = ["alternating"]
IDS = token_ids(3, 7)
RECOMPUTED = {"losses.consistency.recompute": True}


def make(recipe="adamix-lora", base=tiny_llama, **changes):
    config = mixora.recipe(recipe, **{"num_experts": 8, "rank": 2, "share": "none", **changes})
    return fill(get_peft_model(base(), config), names=("mixora_A", "mixora_B", "mixora_bias")).double().train()


def take_step(model, fused=True, labels=IDS):
    """Loss, terms and gradients, and the random state behind them."""
    torch.manual_seed(5)
    loss, terms = mixora.compute_loss(model, {"input_ids": IDS, "labels": labels}, fused_loss=fused)
    loss.backward()
    return {"loss": loss.detach(), **terms, **gradients(model), "random": torch.rand(3)}


def dropping_llama():
    """Attention draws random numbers, so a pass must find the same ones again."""
    return tiny_llama(attention_dropout=0.4, attn_implementation="eager")


@pytest.mark.parametrize("recipe", ["adamix", "adamix-lora"])
@pytest.mark.parametrize(
    ("base", "fused", "labels"),
    [
        (dropping_llama, True, IDS),
        (dropping_llama, False, IDS),
        (tiny_bert_classifier, False, torch.tensor([0, 2, 1])),
        (tiny_t5, False, IDS),
    ],
    ids=["llama-fused", "llama", "bert", "t5"],
)
def test_the_step_is_the_ordinary_one(base, fused, labels, recipe):
    want = take_step(make(recipe, base), fused, labels)
    got = take_step(make(recipe, base, **RECOMPUTED), fused, labels)
    assert got.keys() == want.keys()
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)
    assert want["consistency"] > 1e-6


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_layers_may_be_checkpointed_too(use_reentrant):
    model = make(base=dropping_llama, **RECOMPUTED)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    want, got = take_step(make(base=dropping_llama)), take_step(model)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("recomputes", [False, True])
def test_one_pass_is_alive_at_a_time(recomputes):
    """The activations that a feed-forward part keeps for backward, pass by pass, at the end of each pass."""
    model = make(**{"losses.consistency.recompute": recomputes})
    kept, alive = [], []

    def look(module, args, output):
        kept.append(weakref.ref(output.untyped_storage()))
        alive.append([storage() is not None for storage in kept])

    class Watched(nn.SiLU):
        pass

    model.get_base_model().model.layers[0].mlp.act_fn = watched = Watched()
    watched.register_forward_hook(look)
    loss, _ = mixora.compute_loss(model, {"input_ids": IDS, "labels": IDS})
    loss.backward()
    if recomputes:
        assert alive == [[True], [False, True], [False, False, True]]
    else:
        assert alive == [[True], [True, True]]


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
def test_the_gradient_is_that_of_the_formula(name, tmp_path, alternating):
    catch = Catch()
    model = make_model(**RECOMPUTED)
    trainer = make_trainer(
        getattr(mixora, name), tmp_path, model=model, callbacks=[catch], gradient_accumulation_steps=4
    )
    trainer.train()
    expected = expected_gradients(accumulated_batches(4))
    assert catch.gradients.keys() == expected.keys()
    for parameter, want in expected.items():
        torch.testing.assert_close(catch.gradients[parameter], want, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model = make(**RECOMPUTED)
    base = model.get_base_model()
    before = set(vars(base))
    take_step(model)
    assert set(vars(base)) == before
    own = base.forward
    base.forward = own
    take_step(model)
    assert vars(base)["forward"] is own


def test_two_ranks_hold_what_they_would_without(two_ranks):
    found = two_ranks["one graph"]
    (plain, plain_there), (recomputed, recomputed_there) = found["weights"], found["recomputed"]
    assert torch.equal(plain, plain_there)
    assert torch.equal(recomputed, recomputed_there)
    torch.testing.assert_close(recomputed, plain)
    assert not torch.equal(plain, found["before"])


def test_without_a_second_pass_it_is_refused():
    with pytest.raises(ConfigError, match="recompute has no effect with coefficient 0; valid: recompute with a"):
        mixora.recipe("adamix", **{**RECOMPUTED, "losses.consistency.coefficient": 0.0})
