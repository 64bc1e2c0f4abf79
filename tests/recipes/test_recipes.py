"""Named methods and what may be changed about them."""

import pickle

import pytest
from peft import TaskType

import mixora
from mixora.errors import ConfigError
from mixora.recipes import read_recipe
from mixora.routers.capacity import CapacityConfig
from mixora.training.run_config import leaves_of
from tests.models import tiny_llama


def rule(config, name="attention"):
    return config.method.rules[name]


@pytest.mark.parametrize("name", mixora.recipe_names())
def test_every_recipe_is_complete(name):
    recipe = read_recipe(name)
    assert recipe.title
    assert "arXiv" in recipe.paper or "EMNLP" in recipe.paper
    assert recipe.about.endswith(".")
    assert mixora.recipe(name).recipe == name


def test_sira_is_as_specified_with_the_scale_capacity_and_coefficient_of_the_log():
    config = mixora.recipe("sira")
    router, expert = rule(config).router, rule(config).expert
    assert rule(config).targets == ("attention",)
    assert (router.num_experts, router.top_k, expert.rank) == (16, 4, 4)
    assert (router.renormalise, router.share_router, router.init_std) == (False, False, 0.02)
    assert 0.1 <= router.expert_dropout <= 0.5
    assert router.capacity == CapacityConfig(
        capacity_factor=2.0, min_capacity=4, count_slots=True, group="sequence", admission="token"
    )
    assert router.capacity.capacity_at_inference is False
    assert config.method.losses.load_balance.coefficient == 1.0
    assert (expert.alpha, expert.scale) == (None, 8.0)


@pytest.mark.parametrize(("name", "rank"), [("hilo", (2, 4, 6, 8)), ("mola", 8)])
def test_hilo_and_mola_are_as_specified(name, rank):
    config = mixora.recipe(name)
    router, expert = rule(config, "linears").router, rule(config, "linears").expert
    assert rule(config, "linears").targets == ("all-linear",)
    assert (router.num_experts, router.top_k, router.limit_top_k, router.renormalise) == ((2, 4, 6, 8), 2, True, True)
    assert (router.share_router, router.expert_dropout, router.capacity) == (False, 0, CapacityConfig())
    assert (expert.rank, expert.alpha, expert.scale, expert.dropout) == (rank, None, 2.0, 0.05)
    assert config.method.losses.load_balance.coefficient == 0.001
    assert (config.allocator["kind"], config.allocator["budget"], config.allocation) == ("groups", None, None)


def test_another_kind_takes_its_own_settings():
    both = mixora.recipe("hilo", **{"beta": 1.0, "allocator.kind": "spectral", "budget": 7})
    whole = mixora.recipe("hilo", allocator={"kind": "spectral", "beta": 1.0, "budget": 7})
    assert both.method == whole.method
    with pytest.raises(ConfigError, match="beta: reaches no part of this recipe"):
        mixora.recipe("hilo", beta=1.0)


def test_values_over_depth_survive_their_file(tmp_path):
    config = mixora.recipe("hilo", rank={"from": 1, "to": 4}, num_experts=[2, 3])
    config.save_pretrained(tmp_path)
    assert mixora.MixoraConfig.from_pretrained(tmp_path).method == config.method
    assert rule(config, "linears").expert.rank == {"from": 1, "to": 4}


def test_plain_overrides_reach_every_part_with_such_a_field():
    config = mixora.recipe("sira", num_experts=8, rank=2, capacity_factor=2.0, targets=["q_proj"])
    assert (rule(config).router.num_experts, rule(config).expert.rank) == (8, 2)
    assert rule(config).router.capacity.capacity_factor == 2.0
    assert rule(config).targets == ("q_proj",)
    assert config.rules["attention"]["targets"] == ["q_proj"]
    both = mixora.recipe("sira", coefficient=0.5).method.losses
    assert both.load_balance.coefficient == both.z_loss.coefficient == 0.5


def test_dotted_overrides_reach_one():
    config = mixora.recipe("sira", **{"losses.z_loss.coefficient": 0.5, "rules.attention.expert.rank": 3})
    assert config.method.losses.z_loss.coefficient == 0.5
    assert config.method.losses.load_balance.coefficient == 1.0
    assert rule(config).expert.rank == 3


SCALES = [
    ("lora", {"scale": 8.0}, {8.0}),
    ("adamix-lora", {"rules.projections.expert.scale": 1.0}, {1.0}),
    ("hydralora", {"alpha": 4}, {0.5}),
    ("lora", {"alpha": 16, "scale": 8.0}, {1.0}),
    ("lora", {"alpha": None, "scale": 8.0}, {8.0}),
    ("mixlora", {"rules.attention.expert.scale": 3.0}, {2.0, 3.0}),
    ("pesc", {"rules.ffn.expert.scale": 0.5}, {0.25, 0.5}),
    ("pesc", {"scale": 0.5}, {0.5}),
]


@pytest.mark.parametrize(("name", "overrides", "scales"), SCALES)
def test_a_scale_takes_the_place_of_alpha(name, overrides, scales):
    """`alpha` counts where both are given, as files have both."""
    config = mixora.recipe(name, **overrides)
    assert {site.scale for site in mixora.plan(tiny_llama(), config).sites} == scales
    stored = mixora.MixoraConfig(rules=config.rules, losses=config.losses)
    assert {site.scale for site in mixora.plan(tiny_llama(), stored).sites} == scales


def test_a_file_with_both_keeps_its_meaning():
    rules = mixora.recipe("lora").rules
    assert (rules["attention"]["expert"]["alpha"], rules["attention"]["expert"]["scale"]) == (32, 1)
    assert {site.scale for site in mixora.plan(tiny_llama(), mixora.MixoraConfig(rules=rules)).sites} == {2.0}
    as_run = mixora.recipe("lora", **dict(leaves_of({"rules": rules})))
    assert {site.scale for site in mixora.plan(tiny_llama(), as_run).sites} == {2.0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_expert": 4}, r"num_expert: reaches no part of this recipe; did you mean 'num_experts'\?"),
        ({"rules.attention.router.topk": 4}, r"rules\.attention\.router\.topk: reaches no part"),
        (
            {"top_k": 5, "num_experts": 4},
            r"rules\.attention\.router: top_k 5 is more than num_experts 4",
        ),
        ({"rank": 0}, r"rules\.attention\.expert\.rank: got 0; valid: greater than or equal to 1"),
        ({"rank": "4"}, r"rules\.attention\.expert\.rank: got '4'; valid: a valid integer"),
        ({"expert_dropout": 1.0}, r"expert_dropout: got 1\.0; valid: less than 1"),
        ({"kernel": "fast"}, r"rules\.attention\.kernel: got 'fast'; valid: 'auto', 'loop'"),
        ({"targets": []}, r"rules\.attention\.targets"),
        ({"coefficient": -1}, r"losses\.load_balance\.coefficient: got -1"),
    ],
)
def test_overrides_that_cannot_be(overrides, message):
    with pytest.raises(ConfigError, match=message):
        mixora.recipe("sira", **overrides)


def test_an_unknown_recipe_is_named_with_its_neighbour():
    with pytest.raises(ConfigError, match=r"recipe: got 'siar'.*did you mean 'sira'\?.*known: .*lora"):
        mixora.recipe("siar")


def test_fields_of_peft_pass_through():
    config = mixora.recipe("lora", task_type="SEQ_CLS", modules_to_save=["score"], inference_mode=True, rank=2)
    assert config.task_type == TaskType.SEQ_CLS
    assert (config.modules_to_save, config.inference_mode) == (["score"], True)
    assert rule(config).expert.rank == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"unknown": 1}, r"unknown: unknown key"),
        ({"rule": {}}, r"rule: unknown key; did you mean 'rules'\?"),
        ({"rules": {}}, r"rules: "),
        ({}, r"rules: "),
        ({"rules": {"a": {"targets": ["x"]}}}, r"rules\.a\.expert: is required\nrules\.a\.router: is required"),
        (
            {"rules": {"a": {"targets": ["x"], "expert": {"kind": "lora"}, "router": {"kind": "top"}}}},
            r"rules\.a\.router\.kind: got 'top'; valid: .*did you mean 'topk'",
        ),
    ],
)
def test_a_config_by_hand_is_as_strict(settings, message):
    with pytest.raises(ConfigError, match=message):
        mixora.MixoraConfig(**settings)


def test_a_config_survives_pickle_and_json():
    config = mixora.recipe("sira", rank=3, **{"losses.z_loss.coefficient": 0.1})
    for twin in (pickle.loads(pickle.dumps(config)), mixora.MixoraConfig(rules=config.rules, losses=config.losses)):
        assert twin.method == config.method
        assert (twin.rules, twin.losses) == (config.rules, config.losses)
    assert pickle.loads(pickle.dumps(config)).to_dict() == config.to_dict()


def test_a_config_survives_its_file(tmp_path):
    config = mixora.recipe("sira", rank=3, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    again = mixora.MixoraConfig.from_pretrained(tmp_path)
    assert again.method == config.method
    assert (again.recipe, again.task_type) == ("sira", "CAUSAL_LM")
