"""Threshold routing: who is kept with which weight, by hand."""

import math

import pytest
import torch

from mixora.config import parse
from mixora.routers import Threshold
from mixora.routing import Tokens
from tests.models import all_real


def route(probabilities, bias=0.0, valid=None):
    """Tokens with the given probabilities over E experts, tau = sigmoid(bias) / E for all of them."""
    probs_TE = torch.tensor(probabilities, dtype=torch.float64)
    experts = probs_TE.shape[1]
    tokens = all_real(len(probs_TE), probs_TE.device)
    if valid is not None:
        tokens = Tokens(torch.tensor(valid), tokens.group_T)
    parameters = {
        "router": torch.eye(experts).double(),
        "router_threshold": torch.zeros(1, experts).double(),
        "router_threshold_bias": torch.full((1,), bias).double().requires_grad_(),
    }
    router = Threshold(parse(Threshold.Config, {"num_experts": experts}))
    return router.route(probs_TE.log(), parameters, tokens, training=True), parameters


def test_weights_are_what_exceeds_the_threshold_by_hand():
    """Bias 0, four experts: tau = 1/8. In the first token 0.225, 0.475 and 0.2 exceed it, by 0.1, 0.35 and 0.075."""
    routing, _ = route([[0.225, 0.475, 0.1, 0.2], [0.97, 0.01, 0.01, 0.01]])
    first = torch.tensor([0.1, 0.35, 0.0, 0.075], dtype=torch.float64)
    torch.testing.assert_close(routing.weights_TK[0], first / first.sum())
    torch.testing.assert_close(routing.weights_TK[1], torch.tensor([1.0, 0, 0, 0], dtype=torch.float64))
    assert routing.assigned_TK.tolist() == [[True, True, False, True], [True, False, False, False]]
    # four assignments, two of them to expert 0
    torch.testing.assert_close(routing.load_E(), torch.tensor([0.5, 0.25, 0, 0.25], dtype=torch.float64))


@pytest.mark.parametrize(("bias", "kept"), [(-20.0, 3), (0.0, 2), (math.log(0.9 / 0.1), 1)])
def test_a_higher_threshold_keeps_fewer(bias, kept):
    """Probabilities 0.6, 0.25, 0.15 against tau = sigmoid(bias) / 3: near 0, 0.167, 0.3."""
    routing, _ = route([[0.6, 0.25, 0.15]], bias)
    assert int(routing.assigned_TK.sum()) == kept
    assert routing.weights_TK.sum().item() == pytest.approx(1.0)


def test_some_expert_is_always_kept_while_the_sigmoid_is_not_saturated():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(500, 6, generator=generator).softmax(dim=-1).tolist()
    routing, _ = route(probabilities, bias=4.0)
    assert routing.assigned_TK.any(dim=1).all()


def test_a_token_above_no_threshold_is_left_alone_with_finite_gradients():
    """Equal probabilities and a saturated sigmoid: nothing exceeds tau = 1 / E."""
    routing, parameters = route([[0.25] * 4, [0.7, 0.1, 0.1, 0.1]], bias=60.0)
    assert not routing.assigned_TK[0].any()
    assert (routing.weights_TK[0] == 0).all()
    (gradient,) = torch.autograd.grad(routing.weights_TK.sum(), parameters["router_threshold_bias"])
    assert torch.isfinite(gradient).all()


def test_the_threshold_learns_by_its_closed_form():
    """Two experts, p = (0.6, 0.4): w_0 = (0.6 - tau) / (1 - 2 tau), so dw_0 / dtau = 0.2 / (1 - 2 tau)^2."""
    routing, parameters = route([[0.6, 0.4]])
    (gradient,) = torch.autograd.grad(routing.weights_TK[0, 0], parameters["router_threshold_bias"])
    # tau = 1/4, dtau / db = sigmoid' / 2 = 1/8
    assert gradient.item() == pytest.approx(0.2 / 0.25 / 8)


def test_padding_keeps_no_expert():
    routing, _ = route([[0.6, 0.4], [0.6, 0.4]], valid=[True, False])
    assert routing.weights_TK[1].tolist() == [0, 0]
    assert not routing.assigned_TK[1].any()
