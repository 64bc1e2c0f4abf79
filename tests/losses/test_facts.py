"""Closed forms of the auxiliary losses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixora.losses import LoadBalance, ZLoss
from mixora.routing import Routing

BALANCE, Z = LoadBalance(LoadBalance.Config(coefficient=1.0)), ZLoss(ZLoss.Config(coefficient=1.0))


def routing_of(logits_TE, experts_TK):
    assigned_TK = torch.ones(experts_TK.shape, dtype=torch.bool)
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TK = probs_TE.gather(1, experts_TK)
    valid_T = assigned_TK[:, 0]
    return Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, logits_TE.shape[1], logits_TE, probs_TE)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (16, 4), (8, 8), (1, 1)])
def test_balance_is_1_with_a_uniform_router(experts, top_k):
    """Equal probabilities: whichever experts the ties choose."""
    experts_TK = torch.stack([torch.randperm(experts)[:top_k] for _ in range(12)])
    loss = BALANCE.of_site(routing_of(torch.zeros(12, experts), experts_TK))
    assert loss.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 1), (4, 2), (16, 4), (8, 8)])
def test_balance_is_experts_over_k_after_collapse(experts, top_k):
    """All tokens certain of the same K experts, with equal probability 1 / K."""
    logits_TE = torch.full((9, experts), -40.0)
    logits_TE[:, :top_k] = 40.0
    loss = BALANCE.of_site(routing_of(logits_TE, torch.arange(top_k).expand(9, -1)))
    assert loss.item() == pytest.approx(experts / top_k, rel=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_pushes_the_crowded_expert_down(top_k):
    logits_TE = torch.zeros(6, 4, requires_grad=True)
    experts_TK = torch.arange(top_k).expand(6, -1)
    (gradient_TE,) = torch.autograd.grad(BALANCE.of_site(routing_of(logits_TE, experts_TK)), logits_TE)
    assert (gradient_TE[:, :top_k] > 0).all()
    assert (gradient_TE[:, top_k:] < 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 5))
def test_balance_is_experts_times_share_times_probability(seed, count, experts):
    generator = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(count, experts, generator=generator)
    top_k = min(2, experts)
    experts_TK = logits_TE.topk(top_k).indices
    found = BALANCE.of_site(routing_of(logits_TE, experts_TK)).item()
    expected = 0.0
    for e in range(experts):
        share = sum(e in row for row in experts_TK.tolist()) / (count * top_k)
        powers = [[math.exp(v) for v in row] for row in logits_TE.tolist()]
        expected += experts * share * sum(row[e] / sum(row) for row in powers) / count
    assert found == pytest.approx(expected, rel=1e-5)


def test_z_loss_closed_form():
    """Constant logits c over E experts: (c + ln E)^2, also where exp would overflow."""
    for constant in (0.0, 2.5, 200.0):
        logits_TE = torch.full((3, 8), constant)
        loss = Z.of_site(routing_of(logits_TE, torch.zeros(3, 1, dtype=torch.long)))
        assert loss.item() == pytest.approx((constant + math.log(8)) ** 2, rel=1e-6)


def test_z_loss_is_the_mean_over_tokens():
    logits_TE = torch.tensor([[0.0, 0.0], [3.0, 3.0]])
    loss = Z.of_site(routing_of(logits_TE, torch.zeros(2, 1, dtype=torch.long)))
    assert loss.item() == pytest.approx((math.log(2) ** 2 + (3 + math.log(2)) ** 2) / 2, rel=1e-6)
