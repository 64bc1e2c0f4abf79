"""The losses against sums written out number by number, and what their settings allow."""

import math

import pytest
import torch
from pydantic import ValidationError

import mixora.losses
from mixora.losses import LOSSES, Consistency, LoadBalance, ZLoss
from mixora.losses.consistency import ConsistencyConfig
from mixora.routing import Routing

FIRST = [[1.5, -0.5, 0.25], [0.0, 2.0, -1.0]]
SECOND = [[0.5, 0.75, -1.0], [3.0, 0.5, 0.125]]
CONSISTENCY = Consistency(ConsistencyConfig(coefficient=0.5))


def shares(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def double(rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


def test_consistency_is_half_of_both_divergences():
    expected = []
    for p, q in zip(map(shares, FIRST), map(shares, SECOND), strict=True):
        expected.append(sum((a - b) * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2)
    found_N = CONSISTENCY.of_items(double(FIRST), double(SECOND), False)
    torch.testing.assert_close(found_N, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_neither_pass_of_consistency_is_pulled_by_its_own_target():
    """d/dz of KL(q || softmax z) / 2 with q held is (p - q) / 2."""
    first_NC, second_NC = double(FIRST), double(SECOND)
    gradients = torch.autograd.grad(CONSISTENCY.of_items(first_NC, second_NC, False).sum(), [first_NC, second_NC])
    p_NC, q_NC = (torch.tensor([shares(row) for row in rows], dtype=torch.float64) for rows in (FIRST, SECOND))
    torch.testing.assert_close(gradients[0], (p_NC - q_NC) / 2)
    torch.testing.assert_close(gradients[1], (q_NC - p_NC) / 2)


def test_consistency_of_numbers_is_their_squared_difference():
    found_N = CONSISTENCY.of_items(double(FIRST), double(SECOND), True)
    assert found_N.tolist() == [1.0 + 1.25**2 + 1.25**2, 9.0 + 1.5**2 + 1.125**2]


@pytest.mark.parametrize("is_regression", [True, False])
@pytest.mark.parametrize(("given", "found"), [("float16", "float32"), ("bfloat16", "float32"), ("float64", "float64")])
def test_consistency_is_computed_in_fp32_at_least(given, found, is_regression):
    first_NC, second_NC = (torch.tensor(rows, dtype=getattr(torch, given)) for rows in (FIRST, SECOND))
    loss_N = CONSISTENCY.of_items(first_NC, second_NC, is_regression)
    assert loss_N.dtype == getattr(torch, found)
    exact_N = CONSISTENCY.of_items(double(FIRST), double(SECOND), is_regression)
    torch.testing.assert_close(loss_N.double(), exact_N, rtol=1e-6, atol=0)


def test_recompute_needs_a_coefficient():
    message = "recompute has no effect with coefficient 0; valid: recompute with a coefficient above 0"
    with pytest.raises(ValidationError) as caught:
        ConsistencyConfig(recompute=True)
    assert caught.value.errors()[0]["msg"] == f"Value error, {message}"
    assert Consistency(ConsistencyConfig(coefficient=0.1, recompute=True)).recomputes is True
    assert Consistency(ConsistencyConfig(coefficient=0.1)).recomputes is False
    assert Consistency(ConsistencyConfig()).recomputes is False


@pytest.mark.parametrize("name", LOSSES)
def test_a_coefficient_is_no_smaller_than_0(name):
    assert LOSSES[name].Config(coefficient=0.25).coefficient == 0.25
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        LOSSES[name].Config(coefficient=-0.25)


def padded():
    """Two real tokens, that choose experts 0 and 2, and 2, and one of padding, whose logits are large."""
    logits_TE = torch.tensor([[1.0, 0.0, -1.0], [0.5, 0.25, 0.0], [90.0, 80.0, 70.0]], dtype=torch.float64)
    experts_TK = torch.tensor([[0, 2], [2, 1], [0, 1]])
    assigned_TK = torch.tensor([[True, True], [True, False], [False, False]])
    weights_TK = torch.tensor([[0.5, 0.5], [1.0, 0.0], [0.0, 0.0]])
    valid_T = torch.tensor([True, True, False])
    return Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, 3, logits_TE, logits_TE.softmax(dim=1))


def test_balance_of_real_tokens_alone():
    """Shares 1/3, 0 and 2/3 of the three assignments, in fp64 as the probabilities."""
    found = LoadBalance(LoadBalance.Config()).of_site(padded())
    p, q = shares([1.0, 0.0, -1.0]), shares([0.5, 0.25, 0.0])
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(3 * ((p[0] + q[0]) / 2 / 3 + 2 * (p[2] + q[2]) / 2 / 3), rel=1e-12)


def test_z_loss_of_real_tokens_alone():
    sums = [math.log(sum(map(math.exp, row))) for row in ([1.0, 0.0, -1.0], [0.5, 0.25, 0.0])]
    found = ZLoss(ZLoss.Config()).of_site(padded())
    assert found.item() == pytest.approx(sum(value**2 for value in sums) / 2, rel=1e-12)


@pytest.mark.parametrize("count", [0, 1])
def test_losses_without_a_real_token_are_0_and_of_one_token_its_own(count):
    logits_TE = torch.tensor([[1.0, 3.0]] * count).reshape(count, 2)
    ones_TK = torch.ones(count, 1, dtype=torch.bool)
    routing = Routing(
        ones_TK.long(), ones_TK.float(), ones_TK, ones_TK, ones_TK[:, 0], 2, logits_TE, logits_TE.softmax(dim=1)
    )
    z, balance = ZLoss(ZLoss.Config()).of_site(routing), LoadBalance(LoadBalance.Config()).of_site(routing)
    assert z.item() == pytest.approx(count * math.log(math.exp(1) + math.exp(3)) ** 2)
    assert balance.item() == pytest.approx(count * 2 * shares([1.0, 3.0])[1])


def test_routers_without_logits_have_no_loss():
    routing = Routing.even(torch.ones(3, dtype=torch.bool), (0,), 1)
    assert LoadBalance(LoadBalance.Config()).of_site(routing) is None
    assert ZLoss(ZLoss.Config()).of_site(routing) is None


def test_the_package_offers_what_it_names():
    assert mixora.losses.__all__ == ["LOSSES", "Consistency", "LoadBalance", "ZLoss"]
    assert {"load_balance": LoadBalance, "z_loss": ZLoss, "consistency": Consistency} == LOSSES
