"""Draws are uniform and independent; what is served is the drawn expert, or the mean."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chi2

from mixora.routers.uniform import Uniform, UniformConfig
from mixora.routing import Tokens
from mixora.routing.draws import MEAN, Draw
from tests.models import all_real

DRAWS = 6000
# a correct draw fails with a probability of one in a million
QUANTILE = 1 - 1e-6


def keys(count=DRAWS):
    return [Draw(f"{seed}/layers.0.proj") for seed in range(count)]


def statistic(counts, expected):
    return sum((n - expected) ** 2 / expected for n in counts)


@pytest.mark.parametrize("count", [2, 3, 4, 8, 13])
def test_each_expert_is_drawn_as_often(count):
    drawn = [draw.choose("down", count) for draw in keys()]
    counts = [drawn.count(e) for e in range(count)]
    assert statistic(counts, DRAWS / count) < chi2.ppf(QUANTILE, count - 1)


def pairs_of(names):
    if names == "sides":
        return [(d.choose("down", 4), d.choose("up", 4)) for d in keys()]
    if names == "sites":
        return [(Draw(f"{s}/a.1.q").choose("down", 4), Draw(f"{s}/a.2.q").choose("down", 4)) for s in range(DRAWS)]
    return [(Draw(f"{s}/a.1.q").choose("down", 4), Draw(f"{s + 1}/a.1.q").choose("down", 4)) for s in range(DRAWS)]


@pytest.mark.parametrize("names", ["sides", "sites", "passes"])
def test_draws_do_not_depend_on_each_other(names):
    pairs = pairs_of(names)
    counts = [pairs.count(cell) for cell in itertools.product(range(4), repeat=2)]
    assert statistic(counts, DRAWS / 16) < chi2.ppf(QUANTILE, 15)


@given(st.integers(0, 2**62), st.text(max_size=20), st.integers(1, 20))
def test_the_same_key_gives_the_same_expert(seed, path, count):
    first, second = (Draw(f"{seed}/{path}").choose("up", count) for _ in range(2))
    assert first == second
    assert 0 <= first < count


def kept(share, experts=3, rank=2):
    """Distinct tensors under the names that are kept."""
    router = Uniform(UniformConfig(num_experts=experts, share=share))
    shapes = {"A": (rank, 5), "B": (rank, 6), "bias_A": (rank,), "bias_B": (1, 6)}
    names = {name: kind for entry in router.alternatives(shapes) for kind, name in entry.items()}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shapes[kind], generator=generator) for name, kind in names.items()}


@pytest.mark.parametrize(("share", "count"), [("up", 3 * 2 + 2), ("down", 2 + 3 * 2), ("none", 12)])
def test_a_shared_projection_is_kept_once(share, count):
    assert len(kept(share)) == count


@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_the_drawn_expert_serves_as_it_is(share):
    router, tensors, draw = Uniform(UniformConfig(num_experts=3, share=share)), kept(share), Draw("7/x")
    served = router.serve(tensors, draw)
    for kind, side in {"A": "down", "bias_A": "down", "B": "up", "bias_B": "up"}.items():
        name = kind if side == share else f"{kind}_{draw.choose(side, 3)}"
        assert served[kind] is tensors[name]


@pytest.mark.parametrize("members", [None, (0,), (2, 0), (1, 1, 2)])
@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_otherwise_the_mean_of_the_members_serves(share, members):
    tensors = kept(share)
    served = Uniform(UniformConfig(num_experts=3, share=share)).serve(tensors, Draw(members=members))
    for kind, tensor in served.items():
        chosen = [tensors.get(kind, tensors.get(f"{kind}_{m}")) for m in members or range(3)]
        torch.testing.assert_close(tensor, sum(chosen) / len(chosen))
        assert kind not in tensors or tensor is tensors[kind]


def test_one_expert_serves_as_it_is():
    tensors = kept("up", experts=1)
    served = Uniform(UniformConfig(num_experts=1)).serve(tensors, MEAN)
    assert served["A"] is tensors["A_0"]
    assert served["B"] is tensors["B"]


def test_tied_experts_serve_as_the_mean_of_their_products():
    tensors = {name: t.double() for name, t in kept("none").items() if "bias" not in name}
    router = Uniform(UniformConfig(num_experts=3, share="none", tied=True))
    served = router.serve(tensors, MEAN)
    products = [tensors[f"B_{e}"].T @ tensors[f"A_{e}"] for e in range(3)]
    torch.testing.assert_close(served["B"].T @ served["A"], sum(products) / 3)
    drawn = Draw("3/x").choose("down", 3)
    assert router.serve(tensors, Draw("3/x"))["B"] is tensors[f"B_{drawn}"]


def test_the_mean_of_independent_draws_is_the_product_of_means():
    tensors = {name: t.double() for name, t in kept("none").items() if "bias" not in name}
    served = Uniform(UniformConfig(num_experts=3, share="none")).serve(tensors, MEAN)
    all_pairs = [tensors[f"B_{j}"].T @ tensors[f"A_{i}"] for i in range(3) for j in range(3)]
    torch.testing.assert_close(served["B"].T @ served["A"], sum(all_pairs) / 9)


@pytest.mark.parametrize("key", ["11/x", "12/x", "13/x", "14/x"])
@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_the_routing_tells_the_draw(share, key):
    router = Uniform(UniformConfig(num_experts=5, share=share))
    valid_T, draw = torch.tensor([True, True, False]), Draw(key)
    routing = router.route(torch.zeros(3, 2), {}, Tokens(valid_T, torch.zeros(3, dtype=torch.long), draw=draw), True)
    side = "up" if share == "down" else "down"
    assert routing.experts_TK.tolist() == [[draw.choose(side, 5)]] * 3
    assert routing.load_E().argmax() == draw.choose(side, 5)
    assert routing.assigned_TK.flatten().tolist() == valid_T.tolist()


def test_without_a_draw_all_experts_weigh_the_same():
    routing = Uniform(UniformConfig(num_experts=4)).route(torch.zeros(2, 2), {}, all_real(2, "cpu"), False)
    assert routing.weights_TK.tolist() == [[0.25] * 4] * 2
    assert math.isclose(float(routing.load_E().sum()), 1.0)


def test_tied_without_two_projections_is_refused():
    with pytest.raises(ValidationError, match="tied has no effect with share 'up'; valid: tied with share 'none'"):
        UniformConfig(tied=True)
