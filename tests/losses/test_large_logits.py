"""Large but legal logits: no NaN in routers, auxiliary losses, the fused loss and the consistency, also in fp16."""

import pytest
import torch

from mixora.losses import Consistency, LoadBalance, ZLoss
from mixora.losses.fused import cross_entropy, cross_entropy_and_agreement
from mixora.routers import ROUTERS
from mixora.routers.linear import LinearRouter
from mixora.routing import Tokens
from tests.models import all_real

LARGEST = {torch.float16: 6e4, torch.bfloat16: 1e15, torch.float32: 1e15}
DTYPES = list(LARGEST)
ROUTED = [name for name, router in ROUTERS.items() if issubclass(router, LinearRouter)]


def is_finite(*tensors):
    return all(torch.isfinite(tensor).all() for tensor in tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROUTED)
def test_routers_and_their_losses(name, dtype):
    """Inputs near the largest number of fp16: the products are made in fp32, whose squares are within range."""
    router = ROUTERS[name](ROUTERS[name].Config())
    generator = torch.Generator().manual_seed(0)
    sizes = router.parameter_shapes(8)
    parameters = {kind: torch.randn(size, generator=generator).requires_grad_() for kind, size in sizes.items()}
    x_TI = (torch.randn(6, 8, generator=generator).clamp(-1, 1) * LARGEST[dtype]).to(dtype).requires_grad_()
    routing = router.route(x_TI, parameters, all_real(6, x_TI.device), True)
    losses = [kind(kind.Config()).of_site(routing) for kind in (LoadBalance, ZLoss)]
    weights_TK = routing.weights_TK
    (sum(losses) / max(1.0, float(losses[1].detach())) + weights_TK.square().sum()).backward()
    assert is_finite(routing.logits_TE, routing.probs_TE, weights_TK, *losses, x_TI.grad)
    assert is_finite(*(p.grad for p in parameters.values() if p.grad is not None))


def rows(dtype, scale):
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.randn(5, 4, generator=generator).clamp(-1, 1).to(dtype).requires_grad_() for _ in range(2))
    weight = (torch.randn(9, 4, generator=generator).clamp(-1, 1) * scale).to(dtype)
    return first, second, weight, torch.tensor([0, 3, 8, -100, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_loss(dtype):
    first, second, weight, labels = rows(dtype, LARGEST[dtype] / 4)
    assert is_finite(first @ weight.T)
    alone = cross_entropy(first, weight, labels)
    task, agreement = cross_entropy_and_agreement(first, second, weight, labels)
    found = [*torch.autograd.grad(alone, first), *torch.autograd.grad(task, first)]
    exact = torch.nn.functional.cross_entropy(first.double() @ weight.double().T, labels, reduction="sum")
    assert is_finite(alone, task, agreement)
    assert abs(alone.double() / exact - 1) < 8 * torch.finfo(dtype).eps
    # a gradient is as large as the head's weights, which fp16 holds
    assert is_finite(*found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_consistency(dtype):
    first, second, weight, _ = rows(dtype, LARGEST[dtype] / 4)
    logits = [(hidden @ weight.T).detach().requires_grad_() for hidden in (first, second)]
    values_N = Consistency(Consistency.Config(coefficient=1.0)).of_items(*logits, False)
    assert is_finite(values_N, *torch.autograd.grad(values_N.sum(), logits))
    assert (values_N >= 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ROUTED)
def test_what_is_not_a_number_reaches_the_weights(name, value):
    """It is no expert that was not chosen; padding stays 0."""
    router = ROUTERS[name](ROUTERS[name].Config())
    parameters = {kind: torch.full(size, value) for kind, size in router.parameter_shapes(4).items()}
    valid_T = torch.tensor([True, True, False])
    tokens = Tokens(valid_T, torch.zeros(3, dtype=torch.long))
    weights_TK = router.route(torch.ones(3, 4), parameters, tokens, True).weights_TK
    assert weights_TK[valid_T].isnan().any(dim=1).all()
    assert (weights_TK[~valid_T] == 0).all()
