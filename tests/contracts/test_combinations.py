"""What every router x expert x kernel that a plan allows promises together, on one linear, in float64 where it can."""

import itertools

import peft
import pytest
import torch

import mixora
from mixora.contracts import Shape
from mixora.errors import ConfigError
from mixora.experts import EXPERTS
from mixora.kernels import KERNELS
from mixora.routers import ROUTERS
from tests.models import OneLinear, adapt, gradients

# whole 16 bytes, as grouped products want
IN, OUT, RANK = 8, 16, 8
LOSSES = {"load_balance": {"coefficient": 0.5}, "z_loss": {"coefficient": 0.1}}


def dtype_of(kernel):
    objection = KERNELS[kernel].objection(Shape(IN, OUT, (RANK,)), torch.float64)
    return torch.float64 if objection is None else torch.float32


def make_base(kernel):
    return OneLinear(IN, OUT).to(dtype_of(kernel))


def config(router, expert, kernel):
    parts = {"expert": {"kind": expert, "rank": RANK}, "router": {"kind": router}, "kernel": kernel}
    losses = {} if ROUTERS[router].is_static else LOSSES
    return mixora.MixoraConfig(rules={"all": {"targets": ["proj"], **parts}}, losses=losses)


def is_allowed(combination):
    try:
        mixora.plan(make_base(combination[2]), config(*combination))
    except ConfigError:
        return False
    return True


ALL = [c for c in itertools.product(ROUTERS, EXPERTS, KERNELS) if is_allowed(c)]


def make_inputs():
    generator = torch.Generator().manual_seed(5)
    mask_BS = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return torch.randn(2, 6, IN, generator=generator, dtype=torch.float64), mask_BS


def step(combination, x_BSI, mask_BS, seed=4, dtype=None):
    """Output of the real tokens and all gradients of the task and the losses; `seed` is that of the routes."""
    torch.manual_seed(4)
    dtype = dtype or dtype_of(combination[2])
    model = adapt(OneLinear(IN, OUT), config(*combination)).to(dtype)
    torch.manual_seed(seed)
    leaf_BSI = x_BSI.to(dtype, copy=True).requires_grad_()
    y_nO = model(leaf_BSI, attention_mask=mask_BS)[mask_BS.bool()]
    (y_nO * torch.linspace(-1, 1, y_nO.numel(), dtype=y_nO.dtype).reshape(y_nO.shape)).sum().backward()
    return y_nO.detach(), {"x": leaf_BSI.grad[mask_BS.bool()], **gradients(model)}


def assert_same(found, expected):
    exact = found[0].dtype == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if exact else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def test_every_kernel_is_allowed_somewhere():
    """But for one that cannot run on this machine."""
    able = {n for n, kernel in KERNELS.items() if kernel.objection(Shape(IN, OUT, (RANK,)), torch.float32) is None}
    assert {kernel for _, _, kernel in ALL} == able
    assert set(KERNELS) - able <= {"triton"}


@pytest.mark.parametrize(("router", "expert"), sorted({c[:2] for c in ALL}))
def test_every_kernel_gives_what_the_loop_gives(router, expert):
    x_BSI, mask_BS = make_inputs()
    for kernel in [c[2] for c in ALL if c[:2] == (router, expert)]:
        expected = step((router, expert, "loop"), x_BSI, mask_BS, dtype=dtype_of(kernel))
        assert_same(step((router, expert, kernel), x_BSI, mask_BS), expected)


@pytest.mark.parametrize("combination", ALL, ids="-".join)
def test_what_stands_on_padding_does_not_matter(combination):
    """Values of padding may be anything; outputs of real tokens, losses and gradients stay."""
    x_BSI, mask_BS = make_inputs()
    other_BSI = torch.where(mask_BS[:, :, None] == 1, x_BSI, 100 * x_BSI.flip(0))
    assert_same(step(combination, other_BSI, mask_BS), step(combination, x_BSI, mask_BS))


@pytest.mark.parametrize("combination", ALL, ids="-".join)
def test_every_tensor_learns(combination):
    """Over several inputs and routes: a sparse router may leave an expert out of one batch."""
    x_BSI, mask_BS = make_inputs()
    factors = (1.0, -1.0, 0.5) * (4 if combination[0] == "uniform" else 1)
    steps = [step(combination, x_BSI * factor, mask_BS, seed)[1] for seed, factor in enumerate(factors)]
    trainable = [
        name for name, p in adapt(OneLinear(IN, OUT), config(*combination)).named_parameters() if p.requires_grad
    ]
    for name in trainable:
        assert any(name in found and found[name].abs().sum() > 0 for found in steps), name


@pytest.mark.parametrize("combination", ALL, ids="-".join)
def test_the_start_is_the_frozen_module_and_the_counts_are_those_planned(combination):
    x_BSI, mask_BS = make_inputs()
    x_BSI = x_BSI.to(dtype_of(combination[2]))
    torch.manual_seed(3)
    base = make_base(combination[2])
    expected = base(x_BSI)
    (site,) = mixora.plan(base, config(*combination)).sites
    model = peft.get_peft_model(base, config(*combination)).train()
    assert torch.equal(model(x_BSI, attention_mask=mask_BS), expected)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == site.parameters
    assert site.active_parameters <= site.parameters
