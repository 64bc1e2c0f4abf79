"""A plan of sites written by hand: its rows, its table, how it is stored and how it is compared."""

from dataclasses import replace

import pytest

import mixora
from mixora.contracts import Shape
from mixora.errors import MOST_NAMED, CheckpointError
from mixora.planning.plan import Plan, Site, common_prefix


def site(path, **changes):
    made = Site(
        path=path,
        rule="attention",
        in_features=32,
        out_features=16,
        expert="lora",
        ranks=(4, 4),
        router="topk",
        num_experts=2,
        top_k=1,
        kernel="sorted",
        scale=2.0,
        stream="target",
        leader=None,
        parameters=1000,
        active_parameters=600,
    )
    return replace(made, **changes)


Q = [site(f"model.layers.{layer}.attn.q_proj") for layer in (0, 1, 2)]
K = [site(f"model.layers.{i}.attn.k_proj", leader=f"model.layers.{i}.attn.q_proj", ranks=(2, 4)) for i in (0, 2)]


def row(path, sites, **changes):
    same = {"shape": "32 x 16", "experts": 2, "rank": "4", "top_k": 1, "router": "topk", "kernel": "sorted"}
    return {"path": path, **same, "parameters": 1000 * sites, "active_parameters": 600 * sites, **changes}


def test_rows_collapse_layers():
    assert Plan((*Q, *K)).rows() == [
        row("model.layers.{0-2}.attn.q_proj", 3),
        row("model.layers.{0,2}.attn.k_proj", 2, rank="2-4", router="topk (shared)"),
    ]
    assert Plan((*Q, *K)).rows(full=True) == [
        *(row(s.path, 1) for s in Q),
        *(row(s.path, 1, rank="2-4", router="topk (shared)") for s in K),
    ]


def test_only_the_first_number_of_a_path_is_the_layer():
    sites = [site(f"model.layers.{layer}.experts.{e}.up") for layer in (3, 4) for e in (0, 1)]
    assert [r["path"] for r in Plan(tuple(sites)).rows()] == [
        "model.layers.{3-4}.experts.0.up",
        "model.layers.{3-4}.experts.1.up",
    ]


def test_what_differs_otherwise_has_a_row_of_its_own():
    others = [replace(Q[1], kernel="joint"), replace(Q[2], ranks=(8, 8))]
    assert [r["path"] for r in Plan((Q[0], *others)).rows()] == [s.path for s in Q]
    assert Plan((Q[0], replace(Q[1], leader="model.layers.0.attn.q_proj"))).rows()[1]["router"] == "topk (shared)"


def test_sums_and_shape():
    plan = Plan((Q[0], replace(Q[1], parameters=7, active_parameters=5)))
    assert (plan.parameters, plan.active_parameters) == (1007, 605)
    assert Q[0].shape == Shape(32, 16, (4, 4))
    assert (plan.notes, plan.kernels, Q[0].role) == ((), (), None)


def cells(table):
    return {column.header: list(column.cells) for column in table.columns}


def test_a_table_with_one_router_tells_it_below():
    table = Plan(
        (*Q, site("model.layers.0.attn.v_proj", parameters=1234567)), kernels=("joint (a)", "loop (b)")
    ).table()
    assert table.title == "4 sites in model.layers"
    assert table.caption == ("trainable 1,237,567, active 2,400 parameters; kernel: joint (a), loop (b); router: topk")
    assert cells(table) == {
        "path": ["{0-2}.attn.q_proj", "0.attn.v_proj"],
        "shape": ["32 x 16"] * 2,
        "experts": ["2"] * 2,
        "rank": ["4"] * 2,
        "top_k": ["1"] * 2,
        "parameters": ["3,000", "1,234,567"],
        "active": ["1,800", "600"],
    }
    assert [column.justify for column in table.columns] == ["left", *["right"] * 6]
    assert [column.no_wrap for column in table.columns] == [False, *[True] * 6]
    assert {column.overflow for column in table.columns} == {"fold"}
    assert table.padding == (0, 1, 0, 0)
    assert table.box.row_left.strip() == ""


def test_a_table_with_two_routers_tells_them_in_a_column():
    table = Plan((Q[0], replace(Q[1], router="soft", path="lm_head"))).table(full=True)
    assert table.title == "2 sites"
    assert cells(table)["router"] == ["topk", "soft"]
    assert cells(table)["path"] == ["model.layers.0.attn.q_proj", "lm_head"]
    assert table.columns[5].justify == "left"
    assert table.caption == "trainable 2,000, active 1,200 parameters; kernel: "


def test_the_text_holds_the_table_and_the_notes():
    lines = str(Plan((Q[0],), notes=("mind this", "and that"))).splitlines()
    assert lines[-2:] == ["note: mind this", "note: and that"]
    assert max(len(line.rstrip()) for line in lines) <= 140
    assert any("1 sites in model.layers" in line for line in lines)
    long = str(Plan((site("model.layers.0." + "x" * 70),), notes=("word " * 27,)))
    assert "note: " + ("word " * 27).rstrip() in long.splitlines()
    assert "note: " + "x" * 135 not in str(Plan((Q[0],), notes=("x" * 135,))).splitlines()


@pytest.mark.parametrize(
    ("paths", "prefix"),
    [
        (["model.layers.0.q", "model.layers.1.k"], "model.layers"),
        (["model.layers.0.q"], "model.layers"),
        (["a.b.c", "a.b.d"], "a.b"),
        (["a.b", "a.b.c"], "a.b"),
        (["a.b", "c.b"], ""),
    ],
)
def test_what_paths_have_in_common(paths, prefix):
    assert common_prefix(paths) == prefix


def test_a_stored_plan_is_read_again():
    plan = Plan((Q[0], replace(K[0], role="first")))
    stored = plan.to_list()
    assert stored[1]["ranks"] == [2, 4]
    assert stored[0]["in_features"] == 32
    assert Plan.from_list(stored) == plan
    plan.check_against(stored)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        ({"ranks": 3}, "0.ranks: Input should be a valid array"),
        ({"strange": 1}, "0.strange: Unexpected keyword argument"),
        ({"in_features": "32"}, "0.in_features: Input should be a valid integer"),
        (None, "0.ranks: Field required"),
    ],
)
def test_a_damaged_plan_is_named(damage, why):
    record = Plan((Q[0],)).to_list()[0]
    record = {key: value for key, value in record.items() if key != "ranks"} if damage is None else {**record, **damage}
    with pytest.raises(CheckpointError, match=f"^the adapter's stored plan is damaged: {why}$"):
        Plan.from_list([record])


def test_of_many_faults_of_a_stored_plan_five_are_told():
    with pytest.raises(CheckpointError) as caught:
        Plan.from_list([{}])
    required = [f"0.{name}: Field required" for name in ("path", "rule", "in_features", "out_features", "expert")]
    assert str(caught.value) == f"the adapter's stored plan is damaged: {'; '.join(required)}"


def test_a_stored_plan_holds_no_nan():
    message = "^the adapter's stored plan is damaged: Out of range float values are not JSON compliant"
    with pytest.raises(CheckpointError, match=message):
        Plan.from_list([{**Q[0].__dict__, "scale": float("nan")}])


def test_a_printed_plan_ends_with_its_last_line():
    printed = str(Plan((Q[0],), notes=("mind the gap",)))
    assert printed.endswith("note: mind the gap")


def test_every_difference_from_the_stored_plan_is_told():
    stored = Plan((Q[0], replace(Q[1], ranks=(2, 2), scale=1.0, kernel="loop"), K[0])).to_list()
    with pytest.raises(CheckpointError) as caught:
        Plan((*Q[:2], Q[2])).check_against(stored)
    assert str(caught.value).splitlines() == [
        "the adapter was trained under another plan, 4 differences:",
        "  model.layers.0.attn.k_proj: missing in this model",
        "  model.layers.1.attn.q_proj.ranks: adapter (2, 2), model (4, 4)",
        "  model.layers.1.attn.q_proj.scale: adapter 1.0, model 2.0",
        "  model.layers.2.attn.q_proj: not in the adapter's plan",
    ]


def test_of_many_differences_the_first_are_told():
    sites = [site(f"model.layers.{layer}.q") for layer in range(MOST_NAMED + 1)]
    with pytest.raises(CheckpointError) as caught:
        Plan(()).check_against(Plan(tuple(sites)).to_list())
    lines = str(caught.value).splitlines()
    assert lines[0] == f"the adapter was trained under another plan, {MOST_NAMED + 1} differences:"
    assert len(lines) == 1 + MOST_NAMED


def test_another_kernel_is_no_difference():
    Plan((Q[0],)).check_against(Plan((replace(Q[0], kernel="loop"),)).to_list())
    assert mixora.Plan is Plan
