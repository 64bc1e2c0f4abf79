"""Experts that go through a feed-forward part, at run time: odd inputs, other adapters, odd models."""

import pytest
import torch
from peft import get_peft_model

import mixora
from mixora.errors import MixoraError, ModelError
from mixora.passes import tracing
from tests.models import adapt, fill, gradients, tiny_llama
from tests.parts import Part, batch, ffn_only, logits, mixlora, with_router


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
def test_an_empty_batch(kernel):
    model = adapt(Part(), ffn_only(kernel=kernel))
    x_BSI = torch.zeros(0, 5, 6, requires_grad=True)
    y_BSO = model(x_BSI)
    assert y_BSO.shape == (0, 5, 6)
    y_BSO.sum().backward()
    assert x_BSI.grad.shape == (0, 5, 6)


def test_a_token_whose_experts_are_all_dropped_keeps_the_frozen_part():
    model, base = adapt(Part(), ffn_only(expert_dropout=0.97)), Part()
    x_BSI = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(2))
    with tracing() as trace:
        y_BSO = model(x_BSI)
    (routing,) = trace.of("layers.0.gate_proj")
    is_left = (routing.weights_TK == 0).all(dim=1).reshape(4, 50)
    assert 0 < is_left.sum() < 200
    torch.testing.assert_close(y_BSO[is_left], base(x_BSI)[is_left])
    assert ((y_BSO - base(x_BSI)).abs().amax(dim=-1)[~is_left] > 1e-4).all()


def test_disabled_it_is_the_base_and_unloading_gives_the_base_back():
    base, model = tiny_llama(), adapt(tiny_llama(), mixlora())
    with model.disable_adapter():
        assert torch.equal(logits(model, base), logits(base, base))
    assert not torch.equal(logits(model, base), logits(base, base))
    assert torch.equal(logits(model.unload(), base), logits(base, base))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_before_a_weight_is_changed(merge):
    base, model = tiny_llama(), adapt(tiny_llama(), mixlora())
    before = logits(model, base)
    message = r"mlp\.gate_proj: cannot be merged: its experts go through the feed-forward part, with a non-linearity"
    with pytest.raises(MixoraError, match=message):
        getattr(model, merge)()
    assert torch.equal(logits(model, base), before)


def test_merging_a_single_expert_is_refused_too():
    model = adapt(Part(), with_router({"kind": "single"}))
    assert not model.base_model.model.layers[0].gate_proj.supports_lora_conversion()
    with pytest.raises(MixoraError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_single_expert_is_plain_lora():
    kinds = ("ffn_lora", "lora")
    one, other = (adapt(tiny_llama(), with_router({"kind": "single"}, kind)) for kind in kinds)
    torch.testing.assert_close(logits(one, tiny_llama()), logits(other, tiny_llama()))
    for model in (one, other):
        model(**batch(tiny_llama())).loss.backward()
    expected = gradients(other)
    assert gradients(one).keys() == expected.keys()
    for name, gradient in gradients(one).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)


def test_two_active_adapters_of_which_one_spans_the_part_are_refused():
    model = adapt(tiny_llama(), mixlora())
    model.add_adapter("second", mixora.recipe("lora", targets=["down_proj"]))
    # one at a time they work
    model.set_adapter("second")
    logits(model, tiny_llama())
    model.set_adapter("default")
    logits(model, tiny_llama())
    model.base_model.set_adapter(["default", "second"])
    message = (
        r"layers\.0\.mlp\.down_proj: the experts of adapter 'default' go through .* 'second' is active or merged too"
    )
    with pytest.raises(ModelError, match=message):
        logits(model, tiny_llama())


def test_adapters_elsewhere_may_be_active_too():
    model = adapt(tiny_llama(), ffn_only())
    model.add_adapter("second", mixora.recipe("lora"))
    model.base_model.set_adapter(["default", "second"])
    fill(model)
    both = logits(model, tiny_llama())
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.equal(logits(model, tiny_llama()), both)


def test_an_adapter_merged_into_the_part_is_refused():
    model = adapt(tiny_llama(), mixora.recipe("lora", targets=["up_proj"]))
    model.add_adapter("second", mixlora())
    model.set_adapter("second")
    model.merge_adapter(["default"])
    with pytest.raises(ModelError, match=r"adapter 'second' go through .* 'default' is active or merged too"):
        logits(model, tiny_llama())


def test_pesc_around_the_part_works_together_with_it():
    rules = {"whole": mixora.recipe("pesc", rank=3).rules["ffn"], "ffn": mixlora().rules["ffn"]}
    base, config = tiny_llama(), mixora.MixoraConfig(rules=rules)
    model = get_peft_model(tiny_llama(), config)
    assert torch.equal(logits(model, base), logits(base, base))
    fill(model).train()(**batch(base)).loss.backward()
    assert len(gradients(model)) == sum(p.requires_grad for p in model.parameters())


def test_the_order_in_which_the_first_linears_run_does_not_matter():
    x_BSI = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    found = []
    for run in (
        lambda b, x: b.down_proj(torch.tanh(b.gate_proj(x)) * b.up_proj(x)),
        lambda b, x: b.down_proj(b.up_proj(x) * torch.tanh(b.gate_proj(x))),
    ):
        torch.manual_seed(1)
        model = adapt(Part(run), ffn_only(expert_dropout=0.3, dropout=0.0))
        torch.manual_seed(2)
        with tracing() as trace:
            y_BSO = model(x_BSI)
        assert [o.path for o in trace.observations] == ["layers.0.gate_proj"]
        y_BSO.square().sum().backward()
        found.append((y_BSO, *gradients(model).values()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


BROKEN = [
    # the last linear alone, one of the first ones missing, two inputs, a hidden state that lost tokens
    (lambda b, x: b.down_proj(torch.cat([x, x[..., :3]], dim=-1)), "ends a feed-forward part, but layers.0.gate_proj"),
    (lambda b, x: b.down_proj(b.gate_proj(x)), "did not all read one input before it in this pass"),
    (lambda b, x: b.down_proj(b.gate_proj(x) * b.up_proj(x + 1)), "did not all read one input before it in this pass"),
    (lambda b, x: b.down_proj((b.gate_proj(x) * b.up_proj(x))[:, 1:]), r"shape \[4, 4, 9\], .* began with 2 slots for"),
]


@pytest.mark.parametrize(("run", "message"), BROKEN)
def test_models_that_do_not_run_the_part_as_one(run, message):
    with pytest.raises(ModelError, match=message):
        adapt(Part(run), ffn_only())(torch.randn(2, 5, 6))


def test_a_linear_called_outside_of_a_pass_says_so():
    model = adapt(tiny_llama(), mixlora())
    with pytest.raises(ModelError, match="valid: a forward pass of the whole model"):
        model.base_model.model.model.layers[0].mlp(torch.randn(1, 3, 32))
