"""Decisions of routers at the edges: devices without numbers, low precision, probabilities of 0, ties, many groups."""

import pytest
import torch

from mixora.config import parse
from mixora.routers import ROUTERS, Soft, TopK, Uniform
from mixora.routers.capacity import CapacityConfig, admit
from mixora.routers.linear import multiply, softmax
from mixora.routers.uniform import UniformConfig
from mixora.routing import Tokens
from tests.models import all_real

LIMITED = {"num_experts": 4, "capacity": {"capacity_factor": 1.0}}
ORDERS = [{"topk": {**LIMITED, "capacity": {"capacity_factor": 1.0, "admission": order}}} for order in ("choice",)]
FORMS = [*((kind, {}) for kind in ROUTERS), ("topk", LIMITED), *((k, s) for order in ORDERS for k, s in order.items())]


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_the_meta_device_gives_shapes(kind, settings):
    """On which plans are made and memory is estimated."""
    router = ROUTERS[kind](parse(ROUTERS[kind].Config, settings))
    parameters = {name: torch.empty(shape, device="meta") for name, shape in router.parameter_shapes(5).items()}
    tokens = Tokens(torch.ones(6, dtype=torch.bool, device="meta"), torch.zeros(6, dtype=torch.long, device="meta"))
    routing = router.route(torch.empty(6, 5, device="meta"), parameters, tokens, True)
    for tensor in (routing.experts_TK, routing.weights_TK, routing.assigned_TK, routing.admitted_TK):
        assert tensor.device.type == "meta"
        assert tensor.shape == (6, router.num_experts if kind == "uniform" else router.top_k)


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_products_of_any_two_dtypes_are_those_of_fp32(dtypes):
    generator = torch.Generator().manual_seed(0)
    x_TI = torch.randn(7, 5, generator=generator).to(getattr(torch, dtypes[0]))
    w_CI = torch.randn(3, 5, generator=generator).to(getattr(torch, dtypes[1]))
    found = multiply(x_TI, w_CI)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), x_TI.double() @ w_CI.double().T, rtol=1e-6, atol=1e-6)
    assert multiply(x_TI.double(), w_CI).dtype == torch.float64


@pytest.mark.parametrize("is_compiling", [True, False])
def test_softmax_and_its_gradient(monkeypatch, is_compiling):
    """Numbers written out; while a graph is compiled, torch's own stands there, which a compiler knows."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: is_compiling)
    z_TC = torch.tensor([[0.0, 1.0, 3.0], [2.0, 2.0, -1.0]], dtype=torch.float64, requires_grad=True)
    powers_TC = torch.stack([torch.stack([torch.e**v for v in row]) for row in z_TC.detach()])
    expected_TC = powers_TC / powers_TC.sum(dim=1)[:, None]
    found_TC = softmax(z_TC)
    torch.testing.assert_close(found_TC, expected_TC)
    assert ("_Softmax" in type(found_TC.grad_fn).__name__) is not is_compiling
    upstream_TC = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, 1.0]], dtype=torch.float64)
    (gradient_TC,) = torch.autograd.grad(found_TC, z_TC, upstream_TC)
    for p, u, g in zip(expected_TC, upstream_TC, gradient_TC, strict=True):
        jacobian = torch.diag(p) - p[:, None] * p[None]
        torch.testing.assert_close(g, jacobian @ u)


def test_tiny_probabilities_are_0_and_no_choice():
    z_TC = torch.tensor([[0.0, -86.0, -100.0]])
    assert (softmax(z_TC) > 0).tolist() == [[True, True, False]]
    routing = Soft(Soft.Config(num_experts=3)).decide(z_TC, {}, all_real(1, "cpu"), True)
    assert routing.assigned_TK.tolist() == [[True, True, False]]


def admitted(priority_TK, group_T, **changes):
    """The tokens of those that all want the one expert it has room for."""
    count = len(priority_TK)
    experts_TK = torch.zeros(count, 1, dtype=torch.long)
    tokens = Tokens(torch.ones(count, dtype=torch.bool), group_T)
    config = CapacityConfig(**{"capacity_factor": 1.0, "min_capacity": 0, **changes})
    found_TK = admit(config, experts_TK, torch.ones(count, 1, dtype=torch.bool), priority_TK, tokens, 4)
    return found_TK[:, 0].nonzero()[:, 0].tolist()


def test_of_equal_priorities_the_first_is_admitted():
    count = 4096
    found = admitted(torch.ones(count, 1), torch.zeros(count, dtype=torch.long), admission="priority")
    assert found == list(range(count // 4))


def test_a_limit_that_is_only_observed_takes_no_weight():
    config = TopK.Config(num_experts=2, top_k=1, capacity=CapacityConfig(capacity_factor=0.5, min_capacity=0))
    tokens = Tokens(torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.long), observed=True)
    for training, weights in ((False, 4), (True, 1)):
        routing = TopK(config).decide(torch.tensor([[3.0, 0.0]] * 4), {}, tokens, training)
        assert routing.admitted_TK.sum() == 1
        assert (routing.weights_TK > 0).sum() == weights


def test_lines_of_many_groups_do_not_mix():
    """More groups than experts: each group of four tokens has one place with each of four experts."""
    group_T = torch.arange(9).repeat_interleave(4)
    experts_TK = torch.arange(4).repeat(9)[:, None]
    ones_TK = torch.ones(36, 1)
    tokens = Tokens(torch.ones(36, dtype=torch.bool), group_T)
    config = CapacityConfig(capacity_factor=1.0, min_capacity=0)
    assert admit(config, experts_TK, ones_TK.bool(), ones_TK, tokens, 4).all()


def test_members_and_names_of_drawn_experts():
    router = Uniform(UniformConfig(num_experts=2))
    assert router.alternatives(["A", "B"]) == [{"A": "A_0", "B": "B"}, {"A": "A_1", "B": "B"}]
    assert router.top_k == 1
    assert router.parameter_shapes(7) == {}


@pytest.mark.parametrize("kind", ["topk", "soft", "threshold", "null_topk"])
def test_weights_start_with_the_standard_deviation_that_is_set(kind):
    router = ROUTERS[kind](ROUTERS[kind].Config(init_std=0.5))
    parameters = {name: torch.full(shape, 9.0) for name, shape in router.parameter_shapes(4000).items()}
    torch.manual_seed(0)
    router.initialise(parameters)
    for name, tensor in parameters.items():
        if name.endswith("bias"):
            assert (tensor == 0).all()
        else:
            assert abs(float(tensor.std()) - 0.5) < 0.05
            assert abs(float(tensor.mean())) < 0.05


FULL = {"capacity_factor": 0.5, "min_capacity": 0, "capacity_at_inference": True}
CHOOSING = [
    *((kind, {}) for kind in ("topk", "soft", "threshold", "null_topk")),
    *(("topk", settings) for settings in ({"renormalise": True}, {"expert_dropout": 0.5}, {"capacity": FULL})),
]


@pytest.mark.parametrize(("kind", "settings"), CHOOSING)
def test_what_is_chosen_is_what_is_decided_in_evaluation(kind, settings):
    router = ROUTERS[kind](parse(ROUTERS[kind].Config, settings))
    generator = torch.Generator().manual_seed(0)
    shapes = router.parameter_shapes(5)
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    z_TC = multiply(torch.randn(9, 5, generator=generator), router.rows(parameters))
    tokens = all_real(9, "cpu")
    weights_TK, experts_TK = router.choose(z_TC, parameters, tokens)
    routing = router.decide(z_TC, parameters, tokens, False)
    assert torch.equal(experts_TK, routing.experts_TK)
    torch.testing.assert_close(weights_TK, routing.weights_TK)
