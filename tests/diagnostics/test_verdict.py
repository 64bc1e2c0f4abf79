import dataclasses
import math

import pytest

from mixora.diagnostics.collapse import COLLAPSED, measure_evenness
from mixora.diagnostics.record import RunRecord, Similar
from mixora.diagnostics.verdict import judge_routers

NAMES = dict.fromkeys(["title", "recipe", "base", "data", "created", "command", "next_command"], "x")
EVEN = {"experts_per_token": 2.0, "entropy": 1.0, "max_entropy": math.log(4), "dropped_share": 0.0, "load": [0.25] * 4}


def judge(*changes, similar=()):
    sites = [{"path": f"layers.{n}.q_proj", "dead_experts": [], **EVEN, **change} for n, change in enumerate(changes)]
    return [
        (finding.kind, finding.text) for finding in judge_routers(RunRecord(**NAMES, routing=sites, similar=similar))
    ]


def pair(**changes):
    return Similar(
        **{"path": "layers.5.q_proj", "first": 2, "second": 6, "cosine": 0.1, "correlation": None, **changes}
    )


@pytest.mark.parametrize(
    ("load", "per_token", "evenness"),
    [
        ([0.25] * 4, 1, 1.0),
        ([1.0, 0, 0, 0], 1, 0.0),
        ([0.5, 0.5, 0, 0], 1, 0.5),
        ([0.5, 0.5, 0, 0], 2, 0.0),
        ([0.25] * 4, 2, 1.0),
        ([0.5, 0.5, 0, 0], 4, 0.5),  # all experts serve every token: weights tell the load
        ([1.0], 1, None),
        ([0.0, 0.0], 1, None),
        ([math.nan, 0.5], 1, None),
        ([None, None], 1, None),
    ],
)
def test_evenness_is_0_when_all_tokens_use_the_same_experts(load, per_token, evenness):
    assert measure_evenness(load, per_token) == (evenness if evenness is None else pytest.approx(evenness, abs=1e-12))


def test_one_of_eight_experts_with_95_per_cent_is_the_stated_limit():
    at = {share: measure_evenness([share, *[(1 - share) / 7] * 7], 1) for share in (0.94, 0.95)}
    assert at[0.95] < COLLAPSED < at[0.94]


def test_healthy_routers_are_said_to_be():
    assert judge({}, {}) == [("good", "At all 2 sites every expert is used; no router has collapsed.")]
    assert judge({}, similar=[pair()])[0][1] == (
        "At the one site every expert is used and no two are alike; no router has collapsed."
    )
    assert judge() == []


def test_dead_experts_and_collapse_name_their_sites():
    collapsed = {"load": [0.5, 0.5, 0.0, 0.0], "dead_experts": [2, 3]}
    assert judge({}, collapsed, {}) == [
        ("warning", "1 of 3 sites has collapsed: nearly all tokens go to the same experts (layer 1 q_proj)."),
        ("warning", "1 of 3 sites has an expert that no token reaches (layer 1 q_proj: experts 2, 3)."),
    ]
    (dead,) = judge(*[{"dead_experts": [1]}] * 6)
    assert dead[1].startswith("6 of 6 sites have an expert that no token reaches (layer 0 q_proj: expert 1, ")
    assert dead[1].endswith("layer 3 q_proj: expert 1 and 2 more).")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"cosine": 0.99}, "experts 2 and 6, cosine of the weights 0.99"),
        ({"correlation": 0.951}, "experts 2 and 6, correlation of the routing 0.95"),
    ],
)
def test_twins_are_named_with_what_makes_them_so(change, words):
    (twins,) = judge({}, {}, similar=[pair(**change), pair(path="layers.6.q_proj", cosine=0.94)])
    assert twins == ("warning", f"At 1 of 2 sites two experts do nearly the same (layer 5 q_proj: {words}).")


def test_dropped_choices_and_undecided_routers_are_remarks():
    good, dropped, undecided = judge({"dropped_share": 0.25, "entropy": math.log(4)}, {"dropped_share": 0.1})
    assert good[0] == "good"
    assert dropped == (
        "remark",
        "2 of 2 sites have 10% or more of the choices dropped by the limit of capacity in training; most at layer 0 "
        "q_proj, 25%.",
    )
    assert undecided[1].startswith("1 of 2 sites has a router that is all but undecided")
    assert all(kind == "good" for kind, _ in judge({"entropy": math.log(4)}, {}, {}))


def test_every_finding_but_the_good_one_says_what_to_try():
    record = RunRecord(
        **NAMES,
        routing=[{**EVEN, "path": "q", "load": [1.0, 0, 0, 0], "dead_experts": [1, 2, 3], "dropped_share": 1.0}],
        similar=[pair(cosine=1.0)],
    )
    findings = judge_routers(record)
    assert [finding.kind for finding in findings] == ["warning", "warning", "warning", "remark"]
    assert all("Try a" in finding.advice for finding in findings)
    assert judge_routers(dataclasses.replace(record, routing=[{"path": "q"}], similar=[]))[0].kind == "good"
