"""The plan: which sites, how many parameters (counted by hand), every mistake in words."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixora
from mixora.errors import ConfigError
from tests.models import OneLinear, adapt, tiny_bert, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2}


def sira(targets="attention", **changes):
    return mixora.recipe(
        "sira", **{**SMALL, "targets": targets if isinstance(targets, str) else list(targets), **changes}
    )


# Hidden 32 and inner 48 (GPT-2: 128). 4 experts of rank 2: a linear I x O has 8 (I + O) numbers in its experts,
# of which a token uses half, and 4 I in its router.
# Llama's k and v are 16 wide: q, o 512 + 128; k, v 384 + 128; gate, up 640 + 128; down 640 + 192
COUNTS = [
    (tiny_llama, "attention", 8, 4608, 2816),
    (tiny_llama, "feed-forward", 6, 4736, 2816),
    (tiny_llama, "all-linear", 14, 9344, 5632),
    (tiny_bert, "attention", 8, 5120, 3072),
    (tiny_bert, "feed-forward", 4, 3200, 1920),
    (tiny_bert, "all-linear", 12, 8320, 4992),
    (tiny_gpt2, "attention", 4, 3584, 2048),
    (tiny_gpt2, "feed-forward", 4, 6400, 3840),
    (tiny_gpt2, "all-linear", 8, 9984, 5888),
    (tiny_t5, "attention", 24, 15360, 9216),
    (tiny_t5, "feed-forward", 8, 6400, 3840),
    (tiny_t5, "all-linear", 32, 21760, 13056),
]


@pytest.mark.parametrize(("make", "group", "sites", "parameters", "active"), COUNTS)
def test_groups_and_counts(make, group, sites, parameters, active):
    plan = mixora.plan(make(), sira(group))
    assert (len(plan.sites), plan.parameters, plan.active_parameters) == (sites, parameters, active)


@pytest.mark.parametrize(("make", "group", "sites", "parameters", "active"), COUNTS)
def test_the_model_has_as_many_trainable_numbers_as_planned(make, group, sites, parameters, active):
    model = adapt(make(), sira(group))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


@pytest.mark.parametrize(
    ("make", "group", "parameters", "active"),
    [
        (tiny_llama, "attention", 4608 - 2 * 256, 2816 - 2 * 256),  # q, k, v share
        (tiny_llama, "feed-forward", 4736 - 2 * 128, 2816 - 2 * 128),  # gate, up share
        (tiny_bert, "attention", 5120 - 2 * 256, 3072 - 2 * 256),
        (tiny_gpt2, "attention", 3584, 2048),  # one linear for q, k, v as it is
        (tiny_t5, "attention", 15360 - 4 * 256 - 2 * 128, 9216 - 4 * 256 - 2 * 128),  # cross: k, v only
    ],
)
def test_a_shared_router_counts_once(make, group, parameters, active):
    plan = mixora.plan(make(), sira(group, share_router=True))
    assert (plan.parameters, plan.active_parameters) == (parameters, active)
    model = adapt(make(), sira(group, share_router=True))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == parameters


def test_plain_lora_is_all_active():
    """Rank 16: q, o 16 * 64; k, v 16 * 48; two layers."""
    plan = mixora.plan(tiny_llama(), mixora.recipe("lora"))
    assert plan.parameters == plan.active_parameters == 2 * (2 * 1024 + 2 * 768)


def test_llama_2_7b_on_the_meta_device():
    """Per rank, expert and layer 78,080 LoRA numbers, per expert and layer 35,584 router numbers, 32 layers."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    plan = mixora.plan(model, sira("all-linear", num_experts=8, rank=8, top_k=2))
    assert len(plan.sites) == 224
    assert plan.parameters == 159_907_840 + 9_109_504
    assert plan.active_parameters == 39_976_960 + 9_109_504
    assert all(p.is_meta for p in model.parameters())
    assert not any("mixora" in name for name, _ in model.named_parameters())


GROUPS = [2, 4, 6, 8]
# sums over 32 layers of E R times 78,080, and of E times 35,584; active: sum of min(2, E) R times 78,080
TABLE = [
    ({"num_experts": 8, "rank": 8}, 159_907_840, 9_109_504, 39_976_960),
    ({"num_experts": GROUPS, "rank": 8}, 99_942_400, 5_693_440, 39_976_960),
    ({"num_experts": GROUPS, "rank": GROUPS}, 74_956_800, 5_693_440, 24_985_600),
    ({"num_experts": 5, "rank": GROUPS}, 62_464_000, 5_693_440, 24_985_600),
]


@pytest.mark.parametrize(("sizes", "lora", "routers", "active"), TABLE)
def test_counts_of_hilo_on_llama_2_7b(sizes, lora, routers, active):
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    plan = mixora.plan(model, mixora.recipe("hilo", **sizes))
    assert (plan.parameters, plan.active_parameters) == (lora + routers, active + routers)
    assert f"trainable {lora + routers:,}, active {active + routers:,} parameters" in str(plan)
    if sizes == {"num_experts": GROUPS, "rank": GROUPS}:
        assert plan.to_list() == mixora.plan(model, mixora.recipe("hilo")).to_list()
    if sizes == {"num_experts": GROUPS, "rank": 8}:
        assert plan.to_list() == mixora.plan(model, mixora.recipe("mola")).to_list()


@pytest.mark.parametrize(
    ("targets", "leaves"),
    [
        (["q_proj", "mlp.down_proj"], {"q_proj", "down_proj"}),
        (["attention", "down_proj"], {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}),
        (r"model\.layers\.1\..*\.(q|v)_proj", {"q_proj", "v_proj"}),
        (["lm_head"], {"lm_head"}),
        (["model.layers.1.self_attn.k_proj"], {"k_proj"}),
    ],
)
def test_targets_by_ending_expression_and_path(targets, leaves):
    sites = mixora.plan(tiny_llama(), sira(targets)).sites
    assert {site.path.rpartition(".")[2] for site in sites} == leaves
    in_order = [name for name, _ in tiny_llama().named_modules()]
    assert [s.path for s in sites] == sorted((s.path for s in sites), key=in_order.index)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_porj"], r"rules\.attention\.targets: 'q_porj' matches no module of this model; did you mean 'q_proj'\?"),
        (["q_proj", "nothing"], r"'nothing' matches no module.*known: all-linear, attention"),
        (["self_attn"], r"'self_attn' is a LlamaAttention; valid here: linear modules"),
        (["embed_tokens"], r"'embed_tokens' is a Embedding; valid here: linear modules"),
        ("q_proj", r"the expression 'q_proj' matches no linear module.*a list of path endings"),
        ("(q_proj", r"got '\(q_proj', which is no regular expression"),
    ],
)
def test_targets_that_cannot_be_met(targets, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(tiny_llama(), sira(targets))


@pytest.mark.parametrize("make", [mixora.plan, mixora.allocate])
def test_the_name_of_a_recipe_is_no_configuration(make):
    with pytest.raises(ConfigError, match=r"config: got 'sira'; valid: a MixoraConfig, as mixora.recipe"):
        make(tiny_gpt2(), "sira")


def test_only_groups_that_are_there_are_named_as_known():
    known = r"known: all-linear, attention, c_attn, c_fc, c_proj, feed-forward, lm_head\)"
    with pytest.raises(ConfigError, match=known):
        mixora.plan(tiny_gpt2(), sira(["query"]))


def two_rules(first, second):
    part = {"expert": {"kind": "lora"}, "router": {"kind": "topk"}}
    rules = {name: {"targets": targets, **part} for name, targets in (("one", first), ("two", second))}
    return mixora.MixoraConfig(rules=rules)


def test_two_rules_may_stand_side_by_side_but_not_on_one_module():
    plan = mixora.plan(tiny_llama(), two_rules(["q_proj"], ["k_proj"]))
    assert [site.rule for site in plan.sites] == ["one", "two"] * 2
    with pytest.raises(ConfigError, match=r"rules\.two\.targets: .*q_proj is already taken by rule 'one'"):
        mixora.plan(tiny_llama(), two_rules(["q_proj"], ["attention"]))


def test_a_model_without_linears_is_refused():
    with pytest.raises(ConfigError, match="Embedding has no linear modules to adapt"):
        mixora.plan(torch.nn.Embedding(3, 4), sira())


def test_a_group_that_the_model_does_not_have_is_refused():
    with pytest.raises(ConfigError, match=r"'attention' matches no module of this model"):
        mixora.plan(OneLinear(4, 4), sira(["attention"]))


def test_the_printed_table_collapses_layers():
    text = str(mixora.plan(tiny_llama(layers=3), sira(share_router=True)))
    assert "12 sites in model.layers" in text
    assert "{0-2}.self_attn.q_proj" in text
    assert text.count("self_attn") == 4
    assert text.count("(shared)") == 2
    # three layers: q 3 * 640, v 3 * 384
    assert "1,920" in text
    assert "1,152" in text
    assert "trainable 6,144, active 3,456 parameters" in text


def test_layers_that_do_not_follow_each_other_are_listed():
    text = str(mixora.plan(tiny_llama(layers=3), sira(r".*\.(0|2)\.self_attn\.q_proj")))
    assert "{0,2}.self_attn.q_proj" in text


def test_full_rows_stand_for_one_site_each():
    plan = mixora.plan(tiny_llama(), sira())
    assert len(plan.rows()) == 4
    rows = plan.rows(full=True)
    assert len(rows) == 8
    assert rows[1]["path"] == "model.layers.0.self_attn.k_proj"
    assert (rows[1]["shape"], rows[1]["experts"], rows[1]["rank"], rows[1]["parameters"]) == ("32 x 16", 4, "2", 512)


def test_a_router_that_the_task_cannot_teach_is_remarked():
    notes = mixora.plan(tiny_llama(), sira(top_k=1, renormalise=True)).notes
    assert any("top_k 1" in note and "no gradient" in note for note in notes)
    assert not mixora.plan(tiny_llama(), sira(top_k=2, renormalise=True)).notes


@pytest.mark.parametrize(
    ("changes", "scale"), [({}, 8.0), ({"scale": 0.25}, 0.25), ({"alpha": 8.0}, 4.0), ({"alpha": 8, "rank": 16}, 0.5)]
)
def test_scale_is_alpha_over_rank(changes, scale):
    assert {site.scale for site in mixora.plan(tiny_llama(), sira(**changes)).sites} == {scale}


def test_planning_changes_neither_model_nor_config():
    model, config = tiny_llama(), sira()
    before = config.to_dict()
    mixora.plan(model, config)
    assert config.to_dict() == before
    assert config.plan is None
    assert not model._forward_pre_hooks


def test_a_pooler_that_nobody_trained_is_noted_for_classifiers():
    model = tiny_bert_classifier()
    config = mixora.recipe("sira", task_type="SEQ_CLS")
    (note,) = mixora.plan(model, config).notes
    assert note.startswith("bert.pooler.dense: frozen") and "modules_to_save: [pooler]" in note
    for saved in ("pooler", "bert.pooler", "pooler.dense"):
        assert not mixora.plan(model, mixora.recipe("sira", task_type="SEQ_CLS", modules_to_save=[saved])).notes
    assert not mixora.plan(
        model, mixora.recipe("sira", task_type="SEQ_CLS", targets=["all-linear", "pooler.dense"])
    ).notes
    assert not mixora.plan(model, mixora.recipe("sira")).notes
    with torch.no_grad():
        model.bert.pooler.dense.bias[0] = 1e-3
    assert not mixora.plan(model, config).notes
