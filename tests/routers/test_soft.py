"""Soft routing: weights, load, what a report says of it."""

import pytest
import torch

import mixora
from mixora.config import parse
from mixora.losses import LoadBalance
from mixora.routers import Soft
from mixora.routing import Tokens
from tests.models import OneLinear, adapt, all_real

BALANCE = LoadBalance(LoadBalance.Config(coefficient=1.0))


def route(x_TI, w_EI, valid=None):
    tokens = all_real(len(x_TI), x_TI.device)
    if valid is not None:
        tokens = Tokens(torch.tensor(valid), tokens.group_T)
    return Soft(parse(Soft.Config, {"num_experts": len(w_EI)})).route(x_TI, {"router": w_EI}, tokens, training=True)


def test_weights_are_the_softmax_by_hand():
    """Logits ln 1, ln 2, ln 5: weights 1/8, 2/8, 5/8."""
    routing = route(torch.ones(2, 1), torch.tensor([[1.0], [2.0], [5.0]]).log())
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.125, 0.25, 0.625]] * 2))
    assert routing.experts_TK.tolist() == [[0, 1, 2]] * 2


def test_the_load_is_the_mean_weight_of_real_tokens():
    """Weights (0.2, 0.8) and (0.6, 0.4); a third token of padding counts for nothing."""
    logits_TE = torch.tensor([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]).log()
    routing = route(logits_TE, torch.eye(2), valid=[True, True, False])
    torch.testing.assert_close(routing.load_E(), torch.tensor([0.4, 0.6]))
    # 2 * (0.4 * 0.4 + 0.6 * 0.6)
    assert BALANCE.of_site(routing).item() == pytest.approx(1.04, rel=1e-6)


def test_the_balance_loss_moves_and_knows_its_ends():
    assert BALANCE.of_site(route(torch.ones(5, 2), torch.zeros(4, 2))).item() == pytest.approx(1.0)
    collapsed = torch.tensor([[40.0], [0.0], [0.0], [0.0]])
    assert BALANCE.of_site(route(torch.ones(5, 1), collapsed)).item() == pytest.approx(4.0)
    w_EI = torch.tensor([[1.0], [0.0], [0.0]], requires_grad=True)
    (gradient_EI,) = torch.autograd.grad(BALANCE.of_site(route(torch.ones(5, 1), w_EI)), w_EI)
    assert gradient_EI[0] > 0
    assert (gradient_EI[1:] < 0).all()


def test_inspect_reports_mean_weights_entropy_and_all_experts():
    model = adapt(OneLinear(2, 3), mixora.recipe("molora", targets=["proj"], num_experts=2, rank=1))
    with torch.no_grad():
        model.base_model.model.proj.mixora_router["default"].copy_(torch.eye(2))
    x_BSI = torch.tensor([[[0.2, 0.8], [0.6, 0.4], [0.5, 0.5]]]).log()
    (site,) = mixora.inspect(model, {"x": x_BSI, "attention_mask": torch.tensor([[1, 1, 0]])})
    assert site["load"] == pytest.approx([0.4, 0.6])
    assert (site["top_k"], site["experts_per_token"], site["dropped_share"]) == (2, 2.0, 0.0)
    assert site["dead_experts"] == []
    # half the sum of the entropies of (0.2, 0.8) and (0.6, 0.4)
    assert site["entropy"] == pytest.approx((0.5004024 + 0.6730117) / 2, rel=1e-5)


def test_two_batches_weigh_by_their_tokens():
    model = adapt(OneLinear(2, 3), mixora.recipe("molora", targets=["proj"], num_experts=2, rank=1))
    with torch.no_grad():
        model.base_model.model.proj.mixora_router["default"].copy_(torch.eye(2))
    one, three = torch.tensor([[[0.2, 0.8]]]).log(), torch.tensor([[[0.6, 0.4]] * 3]).log()
    (site,) = mixora.inspect(model, [{"x": one}, {"x": three}])
    assert site["load"] == pytest.approx([0.5, 0.5])
