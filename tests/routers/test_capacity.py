"""The capacity limit: how many an expert admits, whom, and what takes no place."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixora.config import parse
from mixora.errors import ConfigError
from mixora.routers import TopK
from mixora.routers.capacity import CapacityConfig, admit
from mixora.routing import Tokens
from tests.models import all_real

FEW = settings(max_examples=40, deadline=None)
IDENTITY_8 = {"router": torch.eye(8)}


def all_to_one(count, factor, top_k, experts, **changes):
    """How many of `count` tokens that all want experts 0..K-1 each of these admits."""
    config = CapacityConfig(capacity_factor=factor, min_capacity=0, **changes)
    experts_TK = torch.arange(top_k).expand(count, -1)
    assigned_TK = torch.ones(count, top_k, dtype=torch.bool)
    tokens = all_real(count, torch.device("cpu"))
    return admit(config, experts_TK, assigned_TK, torch.ones(count, top_k), tokens, experts).sum(dim=0).tolist()


@pytest.mark.parametrize(
    ("count", "factor", "top_k", "experts", "places"),
    [
        (40, 1.1, 2, 8, 11),  # 40 * 1.1 * 2 / 8 is 11, and a rounding error more when taken from left to right
        (50, 1.1, 1, 5, 11),  # the same for 50 * (1.1 / 5)
        (30, 1.25, 4, 16, 10),  # 9.375
        (16, 1.0, 2, 8, 4),
        (17, 1.0, 2, 8, 5),  # 4.25
        (3, 0.1, 1, 8, 1),
        (10, 100.0, 2, 8, 10),
    ],
)
def test_places_with_slots_counted(count, factor, top_k, experts, places):
    assert all_to_one(count, factor, top_k, experts) == [places] * top_k


@pytest.mark.parametrize(("count", "factor", "places"), [(40, 1.1, 6), (30, 1.25, 5), (9, 1.0, 1), (3, 1.0, 0)])
def test_places_without_counting_slots(count, factor, places):
    """round(c S / E), E = 8: 5.5 to 6, 4.69 to 5, 1.125 to 1, 0.375 to 0."""
    assert all_to_one(count, factor, 2, 8, count_slots=False) == [places] * 2


@FEW
@given(st.integers(1, 400), st.integers(1, 40), st.integers(1, 4), st.integers(4, 16))
def test_places_follow_the_exact_formula(count, tenths, top_k, experts):
    exact = ceil(Fraction(tenths, 10) * count * top_k / experts)
    assert all_to_one(count, tenths / 10, top_k, experts) == [min(count, exact)] * top_k


def test_a_minimum_holds_for_short_sequences():
    config = CapacityConfig(capacity_factor=0.1, min_capacity=4)
    experts_TK, ones_TK = torch.zeros(6, 1, dtype=torch.long), torch.ones(6, 1)
    admitted_TK = admit(config, experts_TK, ones_TK.bool(), ones_TK, all_real(6, torch.device("cpu")), 8)
    assert admitted_TK[:, 0].tolist() == [True] * 4 + [False] * 2


@st.composite
def situations(draw):
    """A random choice of 2 of 4 experts for tokens of up to three groups, some slots not assigned."""
    count, seed = draw(st.integers(1, 24)), draw(st.integers(0, 10**6))
    generator = torch.Generator().manual_seed(seed)
    experts_TK = torch.rand(count, 4, generator=generator).argsort(dim=1)[:, :2]
    valid_T = torch.rand(count, generator=generator) < 0.8
    assigned_TK = (torch.rand(count, 2, generator=generator) < 0.7) & valid_T[:, None]
    group_T = torch.randint(0, 3, (count,), generator=generator).sort().values.clamp(max=count - 1)
    priority_TK = torch.rand(count, 2, generator=generator)
    return experts_TK, assigned_TK, priority_TK, Tokens(valid_T, group_T)


ORDERS = st.sampled_from(["token", "choice", "priority"])


@FEW
@given(situations(), ORDERS, st.sampled_from(["sequence", "batch"]), st.sampled_from([0.5, 1.0, 1.5]))
def test_no_expert_admits_more_than_its_places_and_none_stays_empty(situation, order, group, factor):
    experts_TK, assigned_TK, priority_TK, tokens = situation
    config = CapacityConfig(capacity_factor=factor, min_capacity=1, admission=order, group=group)
    admitted_TK = admit(config, experts_TK, assigned_TK, priority_TK, tokens, 4)
    assert not (admitted_TK & ~assigned_TK).any()
    group_T = tokens.group_T if group == "sequence" else torch.zeros_like(tokens.group_T)
    for g in range(3):
        in_group_TK = (group_T == g)[:, None]
        size = int((tokens.valid_T & (group_T == g)).sum())
        places = max(1, ceil(Fraction(factor) * size * 2 / 4))
        for e in range(4):
            at_expert_TK = (experts_TK == e) & in_group_TK
            wanted, got = int((assigned_TK & at_expert_TK).sum()), int((admitted_TK & at_expert_TK).sum())
            assert got == min(wanted, places)


@FEW
@given(situations())
def test_token_order_admits_a_prefix(situation):
    """Whoever is refused stands behind everyone whom the same expert admits in the same group."""
    experts_TK, assigned_TK, priority_TK, tokens = situation
    config = CapacityConfig(capacity_factor=0.5, min_capacity=1)
    admitted_TK = admit(config, experts_TK, assigned_TK, priority_TK, tokens, 4)
    for g in range(3):
        for e in range(4):
            lane_TK = assigned_TK & (experts_TK == e) & (tokens.group_T == g)[:, None]
            lane = admitted_TK[lane_TK].tolist()
            assert lane == sorted(lane, reverse=True)


@FEW
@given(situations(), ORDERS)
def test_unassigned_slots_take_no_place(situation, order):
    """Giving them all to the most crowded expert changes nothing for the others."""
    experts_TK, assigned_TK, priority_TK, tokens = situation
    config = CapacityConfig(capacity_factor=0.5, min_capacity=1, admission=order)
    expected_TK = admit(config, experts_TK, assigned_TK, priority_TK, tokens, 4)
    moved_TK = torch.where(assigned_TK, experts_TK, 0)
    first_TK = torch.where(assigned_TK, priority_TK, 2.0)
    assert torch.equal(admit(config, moved_TK, assigned_TK, first_TK, tokens, 4), expected_TK)


def test_orders_of_admission_differ_as_named():
    """Three tokens, one place per expert. Token 0 wants (1, 0), tokens 1 and 2 want (0, 1)."""
    experts_TK = torch.tensor([[1, 0], [0, 1], [0, 1]])
    priority_TK = torch.tensor([[0.5, 0.3], [0.6, 0.4], [0.9, 0.1]])
    expected = {
        "token": [[True, True], [False, False], [False, False]],
        "choice": [[True, False], [True, False], [False, False]],
        "priority": [[True, False], [False, False], [True, False]],
    }
    for order, admitted in expected.items():
        config = CapacityConfig(capacity_factor=0.1, min_capacity=1, admission=order)
        tokens = all_real(3, torch.device("cpu"))
        found_TK = admit(config, experts_TK, torch.ones(3, 2, dtype=torch.bool), priority_TK, tokens, 8)
        assert found_TK.tolist() == admitted, order


def limited(order, **changes):
    capacity = {"capacity_factor": 1.0, "min_capacity": 1, "admission": order}
    return TopK(parse(TopK.Config, {"num_experts": 8, "top_k": 2, "capacity": capacity, **changes}))


@pytest.mark.parametrize(("order", "is_causal"), [("token", True), ("choice", False), ("priority", False)])
def test_only_token_order_keeps_earlier_tokens_independent_of_the_last(order, is_causal):
    router, tokens = limited(order), all_real(10, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for _ in range(20):
        x_TI = torch.randn(10, 8, generator=generator)
        edited_TI = torch.cat([x_TI[:-1], 3 * torch.randn(1, 8, generator=generator)])
        before, after = (router.route(x, IDENTITY_8, tokens, training=True) for x in (x_TI, edited_TI))
        changed += not torch.equal(before.gates_TE()[:-1], after.gates_TE()[:-1])
    assert (changed == 0) == is_causal


def test_priority_is_by_probability_also_with_renormalised_weights():
    """Token 0: 0.4, 0.01 and six rests; token 1: 0.45, 0.44. Renormalised, token 0's first choice would win."""
    probs_TE = torch.full((2, 8), 0.01)
    probs_TE[0, 0], probs_TE[1, 0], probs_TE[1, 1] = 0.4, 0.45, 0.44
    probs_TE[0, 2:] = 0.59 / 6
    probs_TE[1, 2:] = 0.11 / 6
    routing = limited("priority", renormalise=True).route(
        probs_TE.log(), IDENTITY_8, all_real(2, torch.device("cpu")), training=True
    )
    assert (routing.gates_TE()[:, 0] > 0).tolist() == [False, True]


def test_no_limit_at_inference_unless_asked():
    x_TI = torch.zeros(10, 8)
    x_TI[:, :2] = torch.tensor([4.0, 3.0])
    tokens = all_real(10, torch.device("cpu"))
    free = limited("token").route(x_TI, IDENTITY_8, tokens, training=False)
    assert (free.weights_TK > 0).all()
    capacity = {"capacity_factor": 1.0, "min_capacity": 1, "capacity_at_inference": True}
    held = limited("token", capacity=capacity).route(x_TI, IDENTITY_8, tokens, training=False)
    # C = ceil(10 * 2 / 8) = 3
    assert (held.weights_TK > 0).tolist() == [[True, True]] * 3 + [[False, False]] * 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"capacity_factor": 0}, r"capacity_factor: got 0; valid: greater than 0"),
        ({"admission": "tokens"}, r"admission: got 'tokens'; valid: 'token', 'choice' or 'priority'"),
        ({"min_capacity": -1}, r"min_capacity: got -1"),
        ({"capacity": 1}, r"capacity: unknown key"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        parse(CapacityConfig, settings)
