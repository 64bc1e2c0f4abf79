"""What every loss of the table promises."""

import pytest
import torch

from mixora.losses import LOSSES
from mixora.routing import Routing

FALLS_TO_BF16 = pytest.mark.xfail(
    strict=True, reason="LoadBalance.of_site multiplies matrices inside autocast, which computes them in bfloat16"
)
UNDER_AUTOCAST = [pytest.param(name, marks=FALLS_TO_BF16 if name == "load_balance" else ()) for name in LOSSES]


def make_routing(dtype=torch.float32, experts=4, top_k=2, valid=None):
    """A top-k routing with gradients on its logits."""
    logits_TE = torch.randn(10, experts, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    return logits_TE, routing_of(logits_TE, top_k, valid)


def routing_of(logits_TE, top_k=2, valid=None):
    valid_T = torch.ones(len(logits_TE), dtype=torch.bool) if valid is None else valid
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TK, experts_TK = probs_TE.topk(top_k, dim=-1)
    assigned_TK = valid_T[:, None].expand(weights_TK.shape)
    experts = logits_TE.shape[1]
    return Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, experts, logits_TE, probs_TE)


def loss_of(name, routing):
    return LOSSES[name](LOSSES[name].Config()).of_site(routing)


@pytest.mark.parametrize("name", LOSSES)
def test_an_fp32_scalar_whose_gradient_reaches_the_logits(name):
    logits_TE, routing = make_routing()
    loss = loss_of(name, routing)
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    (gradient_TE,) = torch.autograd.grad(loss, logits_TE)
    assert torch.isfinite(gradient_TE).all()
    assert gradient_TE.abs().max() > 1e-4


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_autocast_changes_no_digit(name):
    _, routing = make_routing()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_of(name, routing)
    assert inside.dtype == torch.float32
    assert inside.item() == loss_of(name, routing).item()


@pytest.mark.parametrize("name", LOSSES)
def test_padding_neither_counts_nor_learns(name):
    logits_TE, routing = make_routing(valid=torch.arange(10) < 6)
    short_TE = logits_TE.detach()[:6].requires_grad_()
    loss, short = loss_of(name, routing), loss_of(name, routing_of(short_TE))
    torch.testing.assert_close(loss, short)
    (gradient_TE,), (short_gradient_TE,) = torch.autograd.grad(loss, logits_TE), torch.autograd.grad(short, short_TE)
    torch.testing.assert_close(gradient_TE[:6], short_gradient_TE)
    assert (gradient_TE[6:] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_only_padding_gives_zero(name):
    logits_TE, routing = make_routing(valid=torch.zeros(10, dtype=torch.bool))
    loss = loss_of(name, routing)
    assert loss.item() == 0
    assert (torch.autograd.grad(loss, logits_TE)[0] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_routers_without_logits_have_no_loss(name):
    routing = make_routing()[1]
    silent = Routing(
        routing.experts_TK, routing.weights_TK, routing.assigned_TK, routing.admitted_TK, routing.valid_T, 4
    )
    assert loss_of(name, silent) is None


@pytest.mark.parametrize("name", LOSSES)
def test_switched_off_by_default(name):
    assert LOSSES[name].Config().coefficient == 0
