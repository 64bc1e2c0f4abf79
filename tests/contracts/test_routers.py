"""What every router of the table promises, in its preset form and in the forms that stress it."""

import pytest
import torch

from mixora.config import parse
from mixora.routers import ROUTERS
from mixora.routing import Tokens

WIDTH = 6
EXTRA = {
    "topk": [
        {"num_experts": 4, "top_k": 4},
        {"num_experts": 4, "top_k": 1, "renormalise": True},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 3, "top_k": 5, "limit_top_k": True, "renormalise": True},
        {"num_experts": 4, "top_k": 2, "expert_dropout": 0.9, "renormalise": True},
        {"num_experts": 4, "top_k": 2, "capacity": {"capacity_factor": 0.5, "min_capacity": 0}},
        {"num_experts": 4, "top_k": 2, "expert_dropout": 0.5, "capacity": {"capacity_factor": 1.0, "min_capacity": 1}},
    ],
    "soft": [{"num_experts": 1}],
    "threshold": [{"num_experts": 1}, {"num_experts": 3}],
    "null_topk": [
        {"num_experts": 4, "null_experts": 1, "top_k": 2},
        {"num_experts": 2, "null_experts": 6, "top_k": 2},
        {"num_experts": 2, "null_experts": 3, "top_k": 5},
        {"num_experts": 1, "null_experts": 1, "top_k": 2},
    ],
}
FORMS = [(kind, settings) for kind in ROUTERS for settings in [{}, *EXTRA.get(kind, [])]]
LEARNED = [(kind, settings) for kind, settings in FORMS if not ROUTERS[kind].is_static]


def build(kind, settings):
    router = ROUTERS[kind](parse(ROUTERS[kind].Config, settings))
    shapes = router.parameter_shapes(WIDTH)
    generator = torch.Generator().manual_seed(1)
    return router, {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def make_tokens(count):
    """Two sequences, every fourth token padding."""
    index = torch.arange(count)
    return Tokens(index % 4 != 3, index // max(1, (count + 1) // 2))


def route(kind, settings, count=12, dtype=torch.float32, training=True):
    router, parameters = build(kind, settings)
    x_TI = torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)
    torch.manual_seed(3)
    return router, make_tokens(count), router.route(x_TI, parameters, make_tokens(count), training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("count", [0, 1, 12])
@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_shapes_are_static_and_experts_distinct(kind, settings, count, training):
    router, _, routing = route(kind, settings, count, training=training)
    # without a draw, the mean of all serves
    size = (count, router.num_experts if router.draws else router.top_k)
    assert routing.num_experts == router.num_experts
    for tensor in (routing.experts_TK, routing.weights_TK, routing.assigned_TK, routing.admitted_TK):
        assert tensor.shape == size
    assert routing.experts_TK.dtype == torch.int64
    assert routing.assigned_TK.dtype == routing.admitted_TK.dtype == torch.bool
    assert all(len(set(row)) == size[1] for row in routing.experts_TK.tolist())
    assert all(0 <= e < router.num_experts for row in routing.experts_TK.tolist() for e in row)


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_admitted_slots_are_assigned_ones_of_real_tokens(kind, settings):
    _, tokens, routing = route(kind, settings)
    assert not routing.assigned_TK[~tokens.valid_T].any()
    assert not (routing.admitted_TK & ~routing.assigned_TK).any()
    assert torch.equal(routing.valid_T, tokens.valid_T)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_weights_sum_to_one_or_are_all_zero_where_the_router_says_so(kind, settings, training):
    router, _, routing = route(kind, settings, training=training)
    if router.sums_to_one:
        is_empty_T = (routing.weights_TK == 0).all(dim=1)
        torch.testing.assert_close(routing.weights_TK.sum(dim=1), torch.where(is_empty_T, 0.0, 1.0))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("kind", "settings"), LEARNED)
def test_padding_and_refused_slots_weigh_nothing(kind, settings, training):
    _, tokens, routing = route(kind, settings, training=training)
    assert (routing.weights_TK[~tokens.valid_T] == 0).all()
    assert torch.isfinite(routing.weights_TK).all()
    in_use = routing.admitted_TK if training else routing.assigned_TK
    assert torch.equal(routing.weights_TK > 0, in_use)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "settings"), LEARNED)
def test_everything_is_computed_in_fp32(kind, settings, dtype, autocast):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        _, _, routing = route(kind, settings, dtype=dtype)
    assert routing.logits_TE.dtype == routing.probs_TE.dtype == routing.weights_TK.dtype == torch.float32
    # the same numbers as float64 gives for the same inputs: no step fell into low precision
    _, parameters = build(kind, settings)
    x_TI = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype).double()
    logits_TE = x_TI @ parameters["router"].double().T
    torch.testing.assert_close(routing.logits_TE.double(), logits_TE, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.probs_TE.double(), logits_TE.softmax(dim=-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "settings"), LEARNED)
def test_the_same_seed_repeats_the_routing(kind, settings):
    first, second = (route(kind, settings)[2] for _ in range(2))
    assert torch.equal(first.weights_TK, second.weights_TK)
    assert torch.equal(first.experts_TK, second.experts_TK)


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_parameters_are_named_and_filled(kind, settings):
    router, parameters = build(kind, settings)
    assert all(name.startswith("router") for name in parameters)
    empty = {name: torch.full_like(tensor, torch.nan) for name, tensor in parameters.items()}
    router.initialise(empty)
    assert all(torch.isfinite(tensor).all() for tensor in empty.values())


@pytest.mark.parametrize(("kind", "settings"), FORMS)
def test_gates_and_load_agree_with_the_slots(kind, settings):
    router, _, routing = route(kind, settings)
    gates_TE, counts_E = torch.zeros(12, router.num_experts), torch.zeros(router.num_experts)
    for t, experts in enumerate(routing.experts_TK.tolist()):
        for k, e in enumerate(experts):
            gates_TE[t, e] = routing.weights_TK[t, k]
            counts_E[e] += float(routing.weights_TK[t, k] if routing.is_soft else routing.assigned_TK[t, k])
    assert torch.equal(routing.gates_TE(), gates_TE)
    torch.testing.assert_close(routing.load_E(), counts_E / counts_E.sum().clamp(min=1))
