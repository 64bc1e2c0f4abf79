"""Null experts: empty slots, renormalised weights, their part in the balance loss, all by hand."""

import pytest
import torch

import mixora
from mixora.config import parse
from mixora.errors import ConfigError
from mixora.kernels import Loop
from mixora.losses import LoadBalance
from mixora.routers import NullTopK
from tests.models import OneLinear, adapt, all_real

BALANCE = LoadBalance(LoadBalance.Config(coefficient=1.0))


def route(logits_TC, num_experts, top_k):
    columns = logits_TC.shape[1]
    sizes = {"num_experts": num_experts, "null_experts": columns - num_experts, "top_k": top_k}
    router = NullTopK(parse(NullTopK.Config, sizes))
    tokens = all_real(len(logits_TC), logits_TC.device)
    return router.route(logits_TC, {"router": torch.eye(columns)}, tokens, training=True)


def test_weights_of_the_real_ones_are_renormalised():
    """Experts 0, 1, 2 and null experts 3, 4; the three largest of each token."""
    probs_TC = torch.tensor([[0.3, 0.05, 0.1, 0.35, 0.2], [0.4, 0.3, 0.2, 0.05, 0.05], [0.1, 0.02, 0.03, 0.45, 0.4]])
    routing = route(probs_TC.log(), 3, 3)
    expected_TE = torch.tensor([[1.0, 0, 0], [4 / 9, 3 / 9, 2 / 9], [1.0, 0, 0]])
    torch.testing.assert_close(routing.gates_TE(), expected_TE)
    assert routing.null_slots_T.tolist() == [2, 0, 2]
    assert routing.assigned_TK.sum(dim=1).tolist() == [1, 3, 1]
    # five assignments to experts: 3, 1, 1
    torch.testing.assert_close(routing.load_E(), torch.tensor([0.6, 0.2, 0.2]))
    # and four to two null experts, which share them
    torch.testing.assert_close(routing.counts_of_columns(), torch.tensor([3.0, 1, 1, 2, 2]))


def test_a_token_of_null_experts_alone_keeps_the_frozen_output():
    sizes = {"num_experts": 2, "null_experts": 3, "top_k": 2}
    model = adapt(OneLinear(2, 4), mixora.recipe("adamoe", targets=["proj"], rank=1, **sizes))
    with torch.no_grad():
        rows = [[9.0, 0.0], [9.0, 0.1], [0.0, 9.0], [0.0, 9.1], [0.0, 0.0]]
        model.base_model.model.proj.mixora_router["default"].copy_(torch.tensor(rows))
    x_BSI = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    y_BSO = model(x_BSI)
    frozen_BSO = model.base_model.model.proj.base_layer(x_BSI)
    assert torch.equal(y_BSO[0, 0], frozen_BSO[0, 0])
    assert not torch.allclose(y_BSO[0, 1], frozen_BSO[0, 1])
    y_BSO.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    (site,) = mixora.inspect(model, {"x": x_BSI})
    assert (site["top_k"], site["experts_per_token"], site["load"]) == (2, 1.0, [0.5, 0.5])


def test_null_slots_are_not_computed():
    """The loop over experts computes as many rows as there are real choices."""
    logits_TC = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    routing = route(logits_TC, 3, 2)
    slots = Loop((1, 1, 1)).expand(logits_TC, torch.ones(3, 6), routing)
    assert 0 < int(routing.assigned_TK.sum()) < 80
    assert sum(len(token_n) for token_n, _ in slots) == int(routing.assigned_TK.sum())


@pytest.mark.parametrize(("experts", "nulls", "top_k"), [(2, 3, 5), (1, 1, 2), (2, 6, 7)])
def test_more_choices_than_experts_take_no_expert_twice(experts, nulls, top_k):
    logits_TC = torch.randn(50, experts + nulls, generator=torch.Generator().manual_seed(0))
    routing = route(logits_TC, experts, top_k)
    assert routing.experts_TK.shape == (50, experts)
    assert all(len(set(row)) == experts for row in routing.experts_TK.tolist())
    assert (routing.assigned_TK.sum(dim=1) + routing.null_slots_T == top_k).all()


def test_the_balance_loss_is_1_with_equal_probabilities_whoever_is_chosen():
    assert BALANCE.of_site(route(torch.zeros(7, 6), 4, 3)).item() == pytest.approx(1.0)


@pytest.mark.parametrize(("experts", "nulls"), [(4, 4), (4, 2)])
def test_the_balance_loss_after_a_collapse_onto_null_experts(experts, nulls):
    """All choices on null experts: (E + N) / N, whichever of them it is, since they share their load."""
    for favourites in ([0, 1], [nulls - 2, nulls - 1]):
        logits_TC = torch.full((5, experts + nulls), -40.0)
        logits_TC[:, [experts + n for n in favourites]] = 40.0
        assert BALANCE.of_site(route(logits_TC, experts, 2)).item() == pytest.approx((experts + nulls) / nulls)


def test_the_balance_loss_does_not_tell_null_experts_apart_but_moves_them():
    logits_TC = torch.tensor([[0.0, 0, 0, 0.5, 1.0, 0.5]] * 4, requires_grad=True)
    (gradient_TC,) = torch.autograd.grad(BALANCE.of_site(route(logits_TC, 3, 3)), logits_TC)
    assert (gradient_TC[:, 3:] > 0).all()
    assert (gradient_TC[:, :3] < 0).all()
    torch.testing.assert_close(gradient_TC[:, 3], gradient_TC[:, 5])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 17}, "top_k 17 is more than num_experts 8 [+] null_experts 8"),
        ({"top_k": 1}, r"top_k: got 1; valid: greater than or equal to 2"),
        ({"null_experts": 0}, r"null_experts: got 0; valid: greater than or equal to 1"),
    ],
)
def test_choices_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        mixora.recipe("adamoe", **changes)
