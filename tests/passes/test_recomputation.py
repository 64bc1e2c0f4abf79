"""Activation checkpointing of every kind gives the gradients of a run without it."""

import copy
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mixora
from mixora.passes import tracing
from tests.models import adapt, gradients, tiny_bert, tiny_llama, tiny_t5, token_ids

SETTINGS = {
    "num_experts": 4,
    "top_k": 2,
    "rank": 2,
    "targets": ["all-linear"],
    "expert_dropout": 0.4,
    "rules.attention.expert.dropout": 0.2,
    "capacity_factor": 0.8,
    "min_capacity": 1,
    "losses.load_balance.coefficient": 0.5,
    "losses.z_loss.coefficient": 0.1,
}
KINDS = {"non-reentrant": False, "re-entrant": True}
REENTRANT = pytest.mark.parametrize(
    "use_reentrant",
    [
        pytest.param(
            value,
            marks=pytest.mark.works_with("activation checkpointing", f"{kind}: gradients equal those without"),
            id=kind,
        )
        for kind, value in KINDS.items()
    ],
)


def batch(seed, real, rows=2, length=10):
    """Token ids and labels of rows of which the first has `real` tokens."""
    ids, mask = token_ids(rows, length, seed), torch.ones(rows, length, dtype=torch.long)
    mask[0, real:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def loss_gradients(model, *batches, seed=5):
    """Gradients of the summed losses of several forwards before one backward, with all draws from one seed."""
    torch.manual_seed(seed)
    sum(model(**inputs).loss for inputs in batches).backward()
    return gradients(model)


def checkpointed(model, use_reentrant):
    base = model.get_base_model()
    base.activation_checkpointing_enable({"use_reentrant": use_reentrant, "preserve_rng_state": True})
    if use_reentrant:
        base.enable_input_require_grads()
    base.config.use_cache = False
    return model


def by_hand(model, use_reentrant):
    """Checkpoints every block in the way a user would, unknown to transformers."""

    def wrap(forward):
        def run(hidden, **kwargs):
            return checkpoint(lambda h: forward(h, **kwargs), hidden, use_reentrant=use_reentrant)

        return run

    for block in model.get_base_model().model.layers:
        block.forward = wrap(block.forward)
    if use_reentrant:
        model.get_base_model().enable_input_require_grads()
    return model


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    assert all(g.abs().max() > 0 for name, g in expected.items() if "router" in name)


def llama(**changes):
    return adapt(tiny_llama(), mixora.recipe("sira", **{**SETTINGS, **changes}))


@REENTRANT
@pytest.mark.parametrize("share_router", [False, True])
def test_gradients_are_those_without_checkpointing(use_reentrant, share_router):
    expected = loss_gradients(llama(share_router=share_router), batch(0, 6))
    model = checkpointed(llama(share_router=share_router), use_reentrant)
    assert_equal(loss_gradients(model, batch(0, 6)), expected)


@REENTRANT
def test_two_forwards_with_other_masks_before_one_backward(use_reentrant):
    batches = batch(0, 6), batch(1, 3, length=12)
    expected = loss_gradients(llama(), *batches)
    assert_equal(loss_gradients(checkpointed(llama(), use_reentrant), *batches), expected)


@REENTRANT
def test_checkpoints_set_by_hand(use_reentrant):
    expected = loss_gradients(llama(), batch(0, 6))
    assert_equal(loss_gradients(by_hand(llama(), use_reentrant), batch(0, 6)), expected)


@REENTRANT
def test_checkpoints_set_by_hand_with_two_forwards_before_one_backward(use_reentrant):
    batches = batch(0, 6), batch(1, 3)
    expected = loss_gradients(llama(), *batches)
    assert_equal(loss_gradients(by_hand(llama(), use_reentrant), *batches), expected)


@REENTRANT
def test_checkpoint_around_the_whole_model(use_reentrant):
    inputs = batch(0, 6)
    expected = loss_gradients(llama(), inputs)
    model = llama()
    embedded = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def run(hidden):
        return model(inputs_embeds=hidden, attention_mask=inputs["attention_mask"], labels=inputs["labels"]).loss

    torch.manual_seed(5)
    checkpoint(run, embedded, use_reentrant=use_reentrant).backward()
    assert_equal(gradients(model), expected)


@REENTRANT
@pytest.mark.parametrize("make", [tiny_bert, tiny_t5])
def test_other_architectures(make, use_reentrant):
    config = mixora.recipe("sira", **SETTINGS)
    inputs = batch(0, 6)

    def outcome(model):
        # in float64: T5's own rounding, times the scale of the experts, would hide what differs
        model = model.double()
        torch.manual_seed(5)
        if make is tiny_t5:
            model(**inputs).loss.backward()
        else:
            model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[..., 0].square().sum().backward()
        return gradients(model)

    expected = outcome(adapt(make(), config))
    assert_equal(outcome(checkpointed(adapt(make(), config), use_reentrant)), expected)


@REENTRANT
def test_auxiliary_gradient_alone_survives(use_reentrant):
    """The task's gradient is cut off: what reaches the routers is the auxiliary loss, once."""

    def only_auxiliary(model):
        torch.manual_seed(5)
        (model(**batch(0, 6)).logits * 0).sum().backward()
        return {name: g for name, g in gradients(model).items() if "router" in name}

    expected = only_auxiliary(llama())
    assert_equal(only_auxiliary(checkpointed(llama(), use_reentrant)), expected)


def test_a_trace_sees_every_routing_once():
    model = checkpointed(llama(), use_reentrant=False)
    with tracing() as trace:
        model(**batch(0, 6)).loss.backward()
    assert len(trace.observations) == 2 * 7
    assert {len(trace.of(o.path)) for o in trace.observations} == {1}


@pytest.mark.parametrize("share_router", [False, True])
@pytest.mark.parametrize("mode", ["inference", "checkpointing"])
def test_a_pass_holds_no_input_of_a_block_that_is_done(mode, share_router):
    model = llama(share_router=share_router)
    model = model.eval() if mode == "inference" else checkpointed(model, use_reentrant=False)
    base, seen, alive = model.get_base_model(), [], []
    first, head = base.model.layers[0].self_attn, base.lm_head
    first.register_forward_pre_hook(lambda m, a, k: seen.append(weakref.ref(k["hidden_states"])), with_kwargs=True)
    head.register_forward_pre_hook(lambda m, a: alive.append(seen[0]() is not None))
    with torch.set_grad_enabled(mode != "inference"):
        model(**batch(0, 6))
    assert alive == [False]


def test_checkpointing_may_be_switched_on_and_off_between_steps():
    expected, model = loss_gradients(llama(), batch(0, 6)), llama()
    loss_gradients(model, batch(1, 4))
    checkpointed(model, use_reentrant=False)
    assert_equal(loss_gradients(model, batch(0, 6)), expected)
    model.get_base_model().activation_checkpointing_disable()
    assert_equal(loss_gradients(model, batch(0, 6)), expected)


def test_a_copy_made_after_a_checkpointed_step_is_independent():
    model = checkpointed(llama(), use_reentrant=False)
    loss_gradients(model, batch(0, 6))
    twin = copy.deepcopy(model)
    first = loss_gradients(model, batch(1, 4))
    assert all(p.grad is None for p in twin.parameters())
    assert_equal(loss_gradients(twin, batch(1, 4)), first)
