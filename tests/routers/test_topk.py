"""Top-k routing: which experts, which weights, expert dropout, start values."""

import pytest
import torch
from torch.nn import functional as F

from mixora.config import parse
from mixora.errors import ConfigError
from mixora.routers import TopK
from tests.models import all_real

WIDTH = 5


def route(training=True, count=200, dtype=torch.float32, **settings):
    router = TopK(parse(TopK.Config, {"num_experts": 6, "top_k": 2, **settings}))
    generator = torch.Generator().manual_seed(0)
    x_TI, w_EI = torch.randn(count, WIDTH, generator=generator), torch.randn(6, WIDTH, generator=generator)
    return (x_TI @ w_EI.T).softmax(dim=-1), router.route(
        x_TI.to(dtype), {"router": w_EI}, all_real(count, torch.device("cpu")), training
    )


def test_weights_are_the_largest_probabilities():
    probs_TE, routing = route()
    for t, row in enumerate(probs_TE.tolist()):
        best = sorted(range(6), key=lambda e: -row[e])[:2]
        assert routing.experts_TK[t].tolist() == best
        assert routing.weights_TK[t].tolist() == pytest.approx([row[e] for e in best], rel=1e-5)


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_renormalised_weights_sum_to_1(top_k):
    probs_TE, routing = route(renormalise=True, top_k=top_k)
    torch.testing.assert_close(routing.weights_TK.sum(dim=1), torch.ones(200))
    kept_TK = probs_TE.gather(1, routing.experts_TK)
    torch.testing.assert_close(routing.weights_TK, kept_TK / kept_TK.sum(dim=1, keepdim=True))


def test_expert_dropout_withholds_pairs_of_token_and_expert(monkeypatch):
    """With a known mask: dropped experts are never chosen, the others weigh 1 / (1 - q) more."""
    mask_TE = torch.rand(200, 6, generator=torch.Generator().manual_seed(1)) > 0.5
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x * mask_TE / (1 - p) if training else x)
    probs_TE, routing = route(expert_dropout=0.5)
    expected_TK, experts_TK = (probs_TE * mask_TE * 2).topk(2, dim=1)
    torch.testing.assert_close(routing.weights_TK, expected_TK)
    assert torch.equal(routing.assigned_TK, expected_TK > 0)
    in_use_TK = routing.assigned_TK
    assert torch.equal(routing.experts_TK[in_use_TK], experts_TK[in_use_TK])
    assert (~in_use_TK).any()


def test_expert_dropout_is_drawn_per_token_and_expert_and_only_in_training():
    _, routing = route(count=4000, top_k=6, expert_dropout=0.3)
    dropped_TE = routing.gates_TE() == 0
    torch.testing.assert_close(dropped_TE.float().mean(dim=0), torch.full((6,), 0.3), atol=0.04, rtol=0)
    assert dropped_TE.float().std(dim=1).mean() > 0.1
    probs_TE, quiet = route(training=False, expert_dropout=0.3, top_k=6)
    torch.testing.assert_close(quiet.gates_TE(), probs_TE)


def test_balance_reads_probabilities_before_dropout():
    probs_TE, routing = route(expert_dropout=0.5)
    torch.testing.assert_close(routing.probs_TE, probs_TE)


def test_a_slot_whose_probability_was_dropped_takes_no_place(monkeypatch):
    """Expert 0 has places for the three tokens that may use it, though four stand before them who may not."""
    capacity = {"capacity_factor": 0.4, "min_capacity": 0}  # C = ceil(0.4 * 7 * 2 / 2) = 3
    router = TopK(parse(TopK.Config, {"num_experts": 2, "expert_dropout": 0.5, "capacity": capacity}))
    allowed_TE = torch.ones(7, 2)
    allowed_TE[:4, 0] = 0
    monkeypatch.setattr(F, "dropout", lambda x, p, training: x * allowed_TE / (1 - p))
    x_TI = torch.tensor([[2.0, 0.0]]).expand(7, -1)
    routing = router.route(x_TI, {"router": torch.eye(2)}, all_real(7, torch.device("cpu")), training=True)
    assert (routing.gates_TE()[:, 0] > 0).tolist() == [False] * 4 + [True] * 3
    assert (routing.gates_TE()[:, 1] > 0).tolist() == [True] * 3 + [False] * 4


def test_router_starts_small_and_normal():
    router = TopK(parse(TopK.Config, {"num_experts": 64}))
    parameters = {name: torch.empty(shape) for name, shape in router.parameter_shapes(256).items()}
    torch.manual_seed(0)
    router.initialise(parameters)
    assert parameters["router"].shape == (64, 256)
    assert parameters["router"].mean().abs() < 1e-3
    assert parameters["router"].std().item() == pytest.approx(0.02, rel=0.03)


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ConfigError, match="top_k 9 is more than num_experts 8"):
        parse(TopK.Config, {"num_experts": 8, "top_k": 9})
