"""Counts against adapters that are really built, and the choice against trying all settings."""

from functools import cache

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixora
from mixora.comparison.matching import _scale, match_methods
from mixora.comparison.settings import read_comparison
from mixora.errors import ConfigError
from tests.models import tiny_bert, tiny_llama

RECIPES = (
    "sira",
    "hilo",
    "mola",
    "adamix",
    "adamix-lora",
    "mixlora",
    "pesc",
    "molora",
    "hydralora",
    "adamole",
    "adamoe",
)
ONE_RANK = ("adamix", "adamix-lora", "hydralora")
LAYERS = 4


def match(model, methods, **changes):
    tree = {"model": {"base": "x"}, "data": {"source": "y"}, "methods": methods, "match": changes}
    return match_methods(model, read_comparison(tree))


@cache
def model():
    return tiny_llama(layers=LAYERS)


def count_built(config):
    """Numbers that the optimiser would get."""
    adapted = peft.get_peft_model(tiny_llama(layers=LAYERS), config)
    return sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)


@cache
def count_built_at(recipe, rank):
    return count_built(mixora.recipe(recipe, rank=rank))


def count_at(recipe, rank):
    """Without building: what a rank adds is always the same."""
    first, second = count_built_at(recipe, 1), count_built_at(recipe, 2)
    return first + (rank - 1) * (second - first)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(RECIPES), st.integers(30, 60))
def test_what_is_chosen_has_the_parameters_that_it_says(recipe, rank):
    found = match(model(), [{"recipe": "lora", "rank": rank}, recipe], tolerance=0.9)[recipe]
    assert count_built(found.adapter.build()) == found.trainable


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["adamix", "adamix-lora", "molora", "hydralora", "adamole", "adamoe"]), st.integers(8, 40))
def test_the_rank_is_the_nearest_of_all(recipe, rank):
    target = count_at("lora", rank)
    distances = {r: abs(count_at(recipe, r) - target) for r in range(1, 3 * rank)}
    nearest = min(distances.values())
    # a tolerance that the nearest rank just meets, and a start that does not
    tolerance = max(nearest / target + 1e-9, 1e-6)
    found = match(model(), [{"recipe": "lora", "rank": rank}, {"recipe": recipe, "rank": 60}], tolerance=tolerance)[
        recipe
    ]
    assert found.chosen in {f"rank {r}" for r, distance in distances.items() if distance == nearest}


@pytest.mark.parametrize("recipe", ["sira", "adamoe", "hilo", "mola", "mixlora", "pesc"])
def test_a_budget_comes_nearer_than_whole_ranks(recipe):
    found = match(model(), [{"recipe": "lora", "rank": 37}, recipe], tolerance=0.01)
    assert abs(found[recipe].trainable / found["lora"].trainable - 1) <= 0.01


@pytest.mark.parametrize("recipe", ONE_RANK)
def test_experts_of_one_rank_mix_two_ranks_over_the_layers(recipe):
    reference = {"recipe": "lora", "rank": 5}
    found = match(model(), [reference, recipe], tolerance=0.1)
    whole = min(abs(count_at(recipe, r) / found["lora"].trainable - 1) for r in range(1, 20))
    reached = abs(found[recipe].trainable / found["lora"].trainable - 1)
    assert reached <= 0.1
    if "over the layers" in found[recipe].chosen:
        assert reached < whole and whole > 0.1


def test_active_parameters_of_sira_by_formula():
    found = match(model(), ["lora", {"recipe": "sira", "num_experts": 4, "top_k": 2}], parameters="active")["sira"]
    # attention linears of the tiny model: q and o are 32 x 32, k and v 32 x 16; a router is 4 x 32
    rank = int(found.chosen.removeprefix("rank "))
    assert found.active == LAYERS * (rank * 2 * (2 * 64 + 2 * 48) + 4 * 4 * 32)
    assert found.active == pytest.approx(LAYERS * 16 * (2 * 64 + 2 * 48), rel=0.02)
    assert found.trainable == LAYERS * (rank * 4 * (2 * 64 + 2 * 48) + 4 * 4 * 32)


def test_the_scale_is_that_of_the_own_rank():
    found = match(model(), [{"recipe": "lora", "rank": 6}, {"recipe": "mixlora", "num_experts": 2}], tolerance=0.2)
    method = found["mixlora"].adapter.build().method
    assert found["mixlora"].chosen != "as given"
    # alpha 32 at rank 16
    assert {(rule.expert.alpha, rule.expert.scale) for rule in method.rules.values()} == {(None, 2.0)}


@pytest.mark.parametrize("ranks", [[2, 4], {"from": 2, "to": 4}])
def test_the_scales_over_depth_are_those_of_the_own_ranks(ranks):
    given = {"recipe": "lora", "name": "m", "rank": ranks, "alpha": 8.0}
    found = match(model(), [{"recipe": "lora", "rank": 17}, given], tolerance=0.1)["m"]
    (expert,) = (rule.expert for rule in found.adapter.build().method.rules.values())
    first, last = expert.rank.values() if isinstance(ranks, dict) else expert.rank
    assert last > 4 * 4
    assert expert.alpha / last == 8 / 4
    # rounded to a whole rank
    assert expert.alpha / (first + 0.5) <= 8 / 2 <= expert.alpha / (first - 0.5)
    with pytest.raises(ConfigError, match=r"m cannot be; it reaches as given: 8,960 \(.*\)\nvalid"):
        match(model(), [{"recipe": "lora", "rank": 17}, {**given, "budget": 9000}], tolerance=0.001)


def test_what_fits_already_and_what_shall_not_be_matched_stays():
    methods = [{"recipe": "lora", "rank": 4}, {"recipe": "lora", "name": "twin", "rank": 4, "alpha": 8.0}]
    assert match(model(), methods)["twin"].chosen == "as given"
    tree = {"model": {"base": "x"}, "data": {"source": "y"}, "methods": ["lora", "sira"], "match": None}
    found = match_methods(model(), read_comparison(tree))
    assert {m.chosen for m in found.values()} == {"as given"} and found["sira"].trainable > found["lora"].trainable


def test_the_number_of_experts_where_that_is_asked():
    molora = {"recipe": "molora", "vary": "num_experts", "rank": 1}
    found = match(model(), [{"recipe": "lora", "rank": 20}, molora], tolerance=0.1)["molora"]
    config = found.adapter.build().method.rules["attention"]
    assert found.chosen == f"{config.router.num_experts} experts" and config.expert.rank == 1
    with pytest.raises(ConfigError, match="it has one expert; valid: 'rank'"):
        match(model(), ["molora", {"recipe": "lora", "vary": "num_experts", "name": "l"}])


def test_a_budget_of_ones_own_and_allocators_that_look_at_weights():
    methods = [
        {"recipe": "lora", "rank": 40},
        {"recipe": "hilo", "budget": 20_000},
        {"recipe": "hilo", "name": "s", "allocator.kind": "spectral"},
    ]
    found = match(model(), methods, tolerance=0.01)
    target = found["lora"].trainable
    for name in ("hilo", "s"):
        assert found[name].chosen == f"budget {target:,}"
        assert found[name].adapter.build().method.allocator.budget == target
    # with the weights at hand the allocator keeps to it
    assert 0.98 * target < count_built(found["s"].adapter.build()) <= target


def test_models_without_weights_and_encoders():
    with torch.device("meta"):
        empty = tiny_bert(layers=3)
    found = match(empty, ["lora", {"recipe": "sira", "num_experts": 4}], tolerance=0.05)
    assert found["lora"].trainable == 3 * 4 * 16 * 64


def test_what_cannot_be_matched_is_one_error_with_what_can():
    with pytest.raises(ConfigError) as error:
        match(model(), [{"recipe": "lora", "rank": 1}, "sira", "adamix"], tolerance=0.001)
    text = str(error.value)
    assert "lora has 896 trainable parameters" in text and "within 0.1%" in text
    # one rank for each of 16 experts, and the routers: 16 (2 64 + 2 48) + 4 16 32 per layer
    assert f"sira cannot be; it reaches as given: {LAYERS * (64 * 224 + 2048):,}" in text
    assert f"rank 1: {LAYERS * (16 * 224 + 2048):,} (+2414.3%)" in text
    assert "adamix cannot be" in text and "valid: a larger match.tolerance" in text


def test_a_line_of_ranks_keeps_its_form_and_is_not_mixed_over_the_layers():
    hilo = {"recipe": "hilo", "rank": {"from": 4, "to": 8}}
    assert _scale({"from": 4, "to": 8}, 3, 2) == {"from": 6, "to": 12}
    assert _scale([1, 3], 1, 2) == [1, 2]
    found = match(model(), [{"recipe": "lora", "rank": 30}, hilo], tolerance=0.9)["hilo"]
    assert "over the layers" not in found.chosen
