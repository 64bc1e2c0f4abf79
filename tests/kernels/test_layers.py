"""The references of the layer benchmark compute what they are compared with, and every part of it runs."""

import pytest
import torch

from benchmarks import layers, training_step
from benchmarks.kernels import Case
from mixora.passes import tracing


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(layers, "WIDTH", 32)
    monkeypatch.setattr(layers, "INNER", 24)
    monkeypatch.setattr(layers, "TOKENS", 12)
    monkeypatch.setattr(training_step, "LENGTH", 4)
    monkeypatch.setattr(training_step, "VOCABULARY", 64)


def test_the_orders_of_operations_of_mixlora_compute_the_same():
    models = layers.mixlora_models(2, torch.float64)
    with torch.no_grad():
        for name, parameter in models["mixora"].named_parameters():
            # the references have the same memory
            if "mixora_B" in name:
                parameter.mul_(100)
    found = []
    for model in models.values():
        x_BTI = layers.draw_input(torch.float64, 12).requires_grad_()
        y_BTO = model(x_BTI)
        found.append((y_BTO, *torch.autograd.grad(y_BTO.square().sum(), x_BTI)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-8)


def test_the_adapter_beside_pesc_is_as_wide_as_the_chosen_experts():
    rows = layers.compare("pesc", layers.pesc_steps(4, torch.float32), 1)
    assert [row["variant"] for row in rows] == ["mixora", "adapter"]
    assert (rows[1]["ratio"], rows[1]["memory_ratio"]) == (1, 1)
    model = layers.adapt(layers.make_mlp(torch.float32), layers.take_rule("pesc", "ffn", {"kind": "single"}, rank=8))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 8 * 32


def test_adamix_is_timed_with_and_without_consistency():
    rows = layers.compare("adamix", layers.adamix_steps(1, torch.float32), 1)
    ratios = {row["variant"]: row["ratio"] for row in rows}
    assert ratios.keys() == {"mixora", "two plain forwards", "two passes", "mixora, loss not fused"}
    assert ratios["two plain forwards"] == 1


@pytest.mark.parametrize("skewed", [False, True])
def test_one_expert_gets_all_tokens_of_a_skewed_linear(skewed):
    model, x_BTI = layers.make_linear(Case(32, "float32", 4, tokens=12, skewed=skewed))
    with tracing() as trace:
        model(x_BTI)
    (routing,) = trace.of("layers.0.linear")
    assert (routing.experts_TK == 0).any(dim=1).all() == skewed
