"""The adapted module: identity at the start, dtypes, low precision, inference without batch mates."""

import pytest
import torch
from peft import get_peft_model

import mixora
from mixora.passes import injection, tracing
from tests.models import OneLinear, adapt, fill, gradients, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5, token_ids

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "targets": ["all-linear"], "expert_dropout": 0.0}
TIGHT = {"capacity_factor": 0.5, "min_capacity": 1}
LOSSES = {"losses.load_balance.coefficient": 0.5, "losses.z_loss.coefficient": 0.1}


def sira(**changes):
    return mixora.recipe("sira", **{**SMALL, **TIGHT, **LOSSES, **changes})


def inputs_of(make):
    ids = token_ids(2, 8)
    return {"input_ids": ids, "labels": ids} if make is tiny_t5 else {"input_ids": ids}


# adapters of adamix start near the frozen model; queries and values of GPT-2 are one linear
STARTS = [(make, r) for make in (tiny_llama, tiny_bert, tiny_gpt2, tiny_t5) for r in mixora.recipe_names()]


@pytest.mark.parametrize(
    ("make", "recipe"), [s for s in STARTS if s[1] != "adamix" and s != (tiny_gpt2, "adamix-lora")]
)
def test_at_the_start_the_model_is_the_frozen_one_bit_for_bit(make, recipe):
    inputs = inputs_of(make)
    # hilo and mola have values for four groups of layers
    # without gradients: torch multiplies by a weight that has one in another order
    plain = make(layers=4).train().requires_grad_(False)(**inputs)[0]
    model = get_peft_model(make(layers=4), mixora.recipe(recipe)).train()
    with tracing(owns_losses=True):
        assert torch.equal(model(**inputs)[0], plain)


def test_the_auxiliary_losses_change_no_value():
    model = adapt(tiny_llama(), sira())
    with_losses = model(input_ids=token_ids(2, 8)).logits
    silent = adapt(tiny_llama(), sira(**dict.fromkeys(LOSSES, 0.0)))(input_ids=token_ids(2, 8)).logits
    assert torch.equal(with_losses, silent)


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
def test_a_bfloat16_base_trains_close_to_fp32(kernel):
    def step(dtype):
        model = adapt(tiny_llama(), sira(capacity_factor=None, kernel=kernel, rank=4, top_k=4, scale=1.0))
        model.get_base_model().to(dtype)
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.float() if "mixora" in name else parameter.data
        output = model(input_ids=token_ids(2, 8), labels=token_ids(2, 8))
        output.loss.backward()
        return output.logits.float(), gradients(model)

    logits, found = step(torch.bfloat16)
    expected_logits, expected = step(torch.float32)
    assert (logits - expected_logits).norm() < 0.05 * expected_logits.norm()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.isfinite(found[name]).all()
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 0.15 * gradient.norm(), name


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_routers_are_fp32_on_a_bfloat16_base(autocast_adapter_dtype):
    model = adapt(tiny_llama().bfloat16(), sira(), autocast_adapter_dtype=autocast_adapter_dtype)
    dtypes = {kind: {p.dtype for n, p in model.named_parameters() if f"mixora_{kind}" in n} for kind in "AB"}
    routers = {p.dtype for n, p in model.named_parameters() if "mixora_router" in n}
    assert routers == {torch.float32}
    assert dtypes["A"] == dtypes["B"] == {torch.float32 if autocast_adapter_dtype else torch.bfloat16}
    output = model(input_ids=token_ids(2, 8), labels=token_ids(2, 8))
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for n, g in gradients(model).items() if "mixora" in n)


def test_autocast_over_an_fp32_base_keeps_routing_exact():
    """Bit for bit what a router's own product gives; `joint` makes it together with others where it may."""
    model, alone = (adapt(tiny_llama(layers=1), sira(targets=["q_proj"], kernel=name)) for name in ("joint", "stacked"))
    ids = token_ids(2, 8)

    def first_routing(model):
        with tracing() as trace:
            output = model(input_ids=ids, labels=ids)
        return output, trace.observations[0].routing

    plain, expected = first_routing(alone)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, routing = first_routing(model)
    assert torch.equal(routing.experts_TK, expected.experts_TK)
    assert torch.equal(routing.logits_TE, expected.logits_TE)
    torch.testing.assert_close(output.loss, plain.loss, rtol=0.02, atol=0.02)
    output.loss.backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_inference_knows_no_batch_mates():
    model, ids = adapt(tiny_llama(), sira()).eval(), token_ids(4, 8)
    together = model(input_ids=ids).logits
    for row in range(4):
        torch.testing.assert_close(model(input_ids=ids[row : row + 1]).logits[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_limit_at_inference_is_opt_in():
    ids = token_ids(2, 12)
    free = adapt(tiny_llama(), sira()).eval()(input_ids=ids).logits
    without = adapt(tiny_llama(), sira(capacity_factor=None)).eval()(input_ids=ids).logits
    limited = adapt(tiny_llama(), sira(capacity_at_inference=True))
    assert torch.equal(free, without)
    assert not torch.allclose(limited.eval()(input_ids=ids).logits, free)
    assert torch.equal(limited.eval()(input_ids=ids).logits, limited.train()(input_ids=ids).logits)


def test_a_batch_of_sequences_shares_places_only_when_asked():
    """With one place per expert and group, the second row finds them taken."""
    for group, admitted in (("sequence", 4), ("batch", 2)):
        config = sira(targets=["proj"], group=group, capacity_factor=0.01, top_k=1, num_experts=2)
        model = fill(adapt(OneLinear(2, 3), config), std=1)
        with torch.no_grad():
            model.base_model.model.proj.mixora_router["default"].copy_(torch.eye(2))
        x_BSI = torch.eye(2).repeat(2, 3, 1)
        with tracing() as trace:
            model(x_BSI)
        assert int(trace.of("proj")[0].admitted_TK.sum()) == admitted


def test_dropout_of_the_experts_input_is_for_training():
    config = mixora.recipe("lora", dropout=0.5, targets=["proj"])
    model, x = adapt(OneLinear(8, 8), config), torch.randn(4, 8)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_readings_hold_the_terms_without_graph():
    model = adapt(tiny_llama(layers=1), sira(targets=["q_proj"]))
    model(input_ids=token_ids(1, 6))
    readings = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").readings["default"]
    assert readings.keys() == {"load_balance", "z_loss"}
    assert not any(value.requires_grad for value in readings.values())


def router_gradients_without_task(owned):
    """What backward gives the routers when the task's own gradient is zero, and the trace of the forward."""
    model = adapt(tiny_llama(), sira(targets=["q_proj", "o_proj"]))
    with tracing(owns_losses=owned) as trace:
        (model(input_ids=token_ids(2, 8)).logits * 0).sum().backward(retain_graph=owned)
    return model, trace, {name: g for name, g in gradients(model).items() if "router" in name}


def test_auxiliary_gradients_come_once_and_with_their_weights():
    """From the layers, they are those of 0.5 balance + 0.1 z, averaged over the sites, in an ordinary loss."""
    found = router_gradients_without_task(owned=False)[2]
    model, trace, from_layers = router_gradients_without_task(owned=True)
    assert all((g == 0).all() for g in from_layers.values())
    terms = []
    for routing in (o.routing for o in trace.observations):
        probs_TE, square_T = routing.probs_TE, routing.logits_TE.logsumexp(dim=1) ** 2
        share_E = torch.bincount(routing.experts_TK.flatten(), minlength=4) / routing.experts_TK.numel()
        terms.append(0.5 * 4 * (share_E * probs_TE.mean(dim=0)).sum() + 0.1 * square_T.mean())
    (sum(terms) / 4).backward()
    expected = {name: g for name, g in gradients(model).items() if "router" in name}
    assert len(expected) == 4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


class AddsInPlace(OneLinear):
    """As Falcon's block adds its attention to the output of its feed-forward part."""

    def forward(self, x):
        y = self.proj(x)
        y += 2 * x
        return (y**2,)


class Adds(AddsInPlace):
    def forward(self, x):
        return ((self.proj(x) + 2 * x) ** 2,)


@pytest.mark.parametrize("kernel", ["joint", "stacked"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_model_may_add_in_place_to_what_a_module_gives(kernel, processes, monkeypatch):
    monkeypatch.setattr(injection, "count_processes", lambda: processes)
    x, found = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)), []
    for block in (AddsInPlace, Adds):
        torch.manual_seed(0)
        model = adapt(block(8, 8), sira(targets=["proj"], kernel=kernel), seed=1)
        model(x)[0].sum().backward()
        found.append(gradients(model))
    assert any("router" in name for name in found[0])
    torch.testing.assert_close(*found)
