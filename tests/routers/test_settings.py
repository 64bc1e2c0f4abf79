"""What the settings of routers are if nobody says so, and where they end."""

import pytest
from pydantic import ValidationError

import mixora.routers
from mixora.config import parse
from mixora.errors import ConfigError
from mixora.routers import ROUTERS, TopK, Uniform
from mixora.routers.capacity import CapacityConfig
from mixora.routers.uniform import UniformConfig

CAPACITY = {
    "capacity_factor": None,
    "min_capacity": 4,
    "count_slots": True,
    "group": "sequence",
    "admission": "token",
    "capacity_at_inference": False,
}
LEARNT = {"num_experts": 8, "share_router": False, "init_std": 0.02}
DEFAULTS = {
    "topk": {
        **LEARNT,
        "top_k": 2,
        "limit_top_k": False,
        "renormalise": False,
        "expert_dropout": 0.0,
        "capacity": CAPACITY,
    },
    "uniform": {"num_experts": 4, "share": "up", "tied": False, "start": "apart"},
    "single": {},
    "soft": LEARNT,
    "threshold": LEARNT,
    "null_topk": {**LEARNT, "null_experts": 8, "top_k": 4},
}


@pytest.mark.parametrize("kind", ROUTERS)
def test_defaults(kind):
    assert ROUTERS[kind].Config().model_dump() == {"kind": kind, **DEFAULTS[kind]}
    with pytest.raises(ConfigError, match="kind"):
        parse(ROUTERS[kind].Config, {"kind": "another"})


LIMITS = [
    *((kind, "num_experts", 1, 0) for kind in ("topk", "uniform", "soft", "threshold", "null_topk")),
    *((kind, "init_std", 0.5, 0.0) for kind in ("topk", "soft", "threshold", "null_topk")),
    ("topk", "top_k", 1, 0),
    ("topk", "expert_dropout", 0.0, -0.1),
    ("topk", "expert_dropout", 0.9, 1.0),
    ("null_topk", "null_experts", 1, 0),
    ("null_topk", "top_k", 2, 1),
    ("null_topk", "top_k", 64, 2**16 + 1),
]


@pytest.mark.parametrize(("kind", "name", "least", "refused"), LIMITS)
def test_limits(kind, name, least, refused):
    beside = {("topk", "num_experts"): {"top_k": 1}, ("null_topk", "top_k"): {"null_experts": 64}}.get((kind, name), {})
    assert getattr(parse(ROUTERS[kind].Config, {name: least, **beside}), name) == least
    with pytest.raises(ConfigError, match=name):
        parse(ROUTERS[kind].Config, {name: refused, **beside})


@pytest.mark.parametrize(
    ("name", "least", "refused"),
    [
        ("capacity_factor", 0.25, 0.0),
        ("min_capacity", 0, -1),
        ("min_capacity", 2**31 - 1, 2**31),
        ("group", "batch", "row"),
        ("admission", "choice", "any"),
        ("admission", "priority", "Token"),
    ],
)
def test_limits_of_capacity(name, least, refused):
    assert getattr(parse(CapacityConfig, {name: least}), name) == least
    with pytest.raises(ConfigError, match=name):
        parse(CapacityConfig, {name: refused})


@pytest.mark.parametrize("share", ["up", "down", "none"])
def test_projections_that_can_be_shared(share):
    assert UniformConfig(share=share).share == share
    assert UniformConfig(share="none", tied=True).tied


MISTAKES = [
    ("topk", {"num_experts": 2, "top_k": 3}, "top_k 3 is more than num_experts 2"),
    (
        "null_topk",
        {"num_experts": 2, "null_experts": 2, "top_k": 5},
        "top_k 5 is more than num_experts 2 + null_experts 2",
    ),
    ("uniform", {"share": "down", "tied": True}, "tied has no effect with share 'down'; valid: tied with share 'none'"),
]


@pytest.mark.parametrize(("kind", "settings", "message"), MISTAKES)
def test_mistakes_are_told_in_full(kind, settings, message):
    with pytest.raises(ValidationError) as caught:
        ROUTERS[kind].Config(**settings)
    assert [error["msg"] for error in caught.value.errors()] == [f"Value error, {message}"]


def test_as_many_choices_as_there_are_columns_are_valid():
    assert ROUTERS["null_topk"].Config(num_experts=2, null_experts=2, top_k=4).top_k == 4
    assert ROUTERS["topk"].Config(num_experts=2, top_k=2).top_k == 2


def test_where_numbers_vary_over_depth_they_are_compared_at_each_site():
    config = TopK.Config(num_experts=(2, 4), top_k=4)
    assert (config.num_experts, config.top_k) == ((2, 4), 4)
    assert TopK.Config(num_experts=2, top_k=(3, 1)).top_k == (3, 1)


@pytest.mark.parametrize(("limit", "top_k"), [(False, 5), (True, 3)])
def test_choices_are_limited_where_that_is_asked(limit, top_k):
    config = TopK.Config(top_k=5).model_copy(update={"num_experts": 3, "limit_top_k": limit})
    assert TopK(config).top_k == top_k


class Behind:
    reads = "output"


class Beside:
    reads = "input"


def test_what_cannot_serve_says_why():
    config = TopK.Config(num_experts=4, top_k=2, capacity=CapacityConfig(capacity_factor=1.0, admission="choice"))
    assert TopK(config).objection(True, Beside()) == (
        "admission: got 'choice', which lets a later token displace an earlier one's expert; "
        "valid for a causal model: 'token'"
    )
    assert TopK(config).objection(False, Beside()) is None
    by_token = config.model_copy(update={"capacity": CapacityConfig(capacity_factor=1.0)})
    assert TopK(by_token).objection(True, Beside()) is None
    unlimited = config.model_copy(update={"capacity": CapacityConfig(admission="choice")})
    assert TopK(unlimited).objection(True, Beside()) is None
    assert TopK(TopK.Config(num_experts=2, top_k=2)).objection(True, Beside()) is None
    few = config.model_copy(update={"num_experts": 1})
    assert TopK(few).objection(False, Beside()) == (
        "top_k: got 2 where num_experts is 1; valid: at most that, or limit_top_k"
    )
    tied = Uniform(UniformConfig(share="none", tied=True))
    assert tied.objection(True, Behind()) == (
        "tied: got true with experts that stand behind a module; valid: false, or LoRA experts"
    )
    assert tied.objection(True, Beside()) is None
    assert Uniform(UniformConfig(share="none")).objection(True, Behind()) is None


SUMS = [
    ("single", {}, True),
    ("soft", {}, True),
    ("threshold", {}, True),
    ("null_topk", {}, True),
    ("uniform", {}, False),
    ("topk", {}, False),
    ("topk", {"renormalise": True}, True),
    ("topk", {"renormalise": True, "capacity": {"capacity_factor": 2.0}}, False),
]


@pytest.mark.parametrize(("kind", "settings", "expected"), SUMS)
def test_whose_weights_sum_to_one(kind, settings, expected):
    assert ROUTERS[kind](parse(ROUTERS[kind].Config, settings)).sums_to_one is expected


LIMITED = {"capacity": {"capacity_factor": 1.0}}
LIMITED_ALWAYS = {"capacity": {"capacity_factor": 1.0, "capacity_at_inference": True}}
FORMS = [
    # kind, settings, by token in evaluation, plain in training, plain in evaluation
    ("topk", {}, True, True, True),
    ("topk", {"expert_dropout": 0.5}, True, False, True),
    ("topk", LIMITED, True, False, False),
    ("topk", LIMITED_ALWAYS, False, False, False),
    ("topk", {"capacity": {"capacity_at_inference": True}}, True, True, True),
    ("soft", {}, True, False, False),
    ("null_topk", {}, True, False, False),
    ("threshold", {}, False, False, False),
]


@pytest.mark.parametrize(("kind", "settings", "by_token", "in_training", "in_evaluation"), FORMS)
def test_what_kernels_may_decide_themselves(kind, settings, by_token, in_training, in_evaluation):
    router = ROUTERS[kind](parse(ROUTERS[kind].Config, settings))
    assert router.joins is True
    assert router.is_by_token is by_token
    assert bool(router.is_plain(True)) is in_training
    assert bool(router.is_plain(False)) is in_evaluation


def test_the_package_offers_what_it_names():
    assert mixora.routers.__all__ == ["ROUTERS", *sorted(router.__name__ for router in ROUTERS.values())]
    assert {name: getattr(mixora.routers, name) for name in mixora.routers.__all__[1:]} == {
        router.__name__: router for router in ROUTERS.values()
    }
    assert all(router.Config().kind == kind for kind, router in ROUTERS.items())
    static = {kind for kind, router in ROUTERS.items() if router.is_static}
    assert (static, ROUTERS["uniform"].draws, ROUTERS["single"].draws) == ({"single", "uniform"}, True, False)
