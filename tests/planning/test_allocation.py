"""Budgets from end to end: met to one expert-rank, stored with the adapter, repeatable, trained and reloaded."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

import mixora
from mixora.allocators import ALLOCATORS
from mixora.errors import CheckpointError, ConfigError, ModelError
from mixora.planning.plan import Plan
from tests.models import adapt, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5, token_ids

KINDS = tuple(ALLOCATORS)
IDS = token_ids(2, 8)
BATCHES = [{"input_ids": token_ids(2, 6, seed=n), "labels": token_ids(2, 6, seed=n)} for n in range(2)]
LLAMA, T5, GPT2 = tiny_llama(layers=4), tiny_t5(), tiny_gpt2()
ONE_RANK = 32 + 48  # I + O of the largest site of both


def hilo(kind="groups", **changes):
    return mixora.recipe("hilo", task_type="CAUSAL_LM", **{"allocator.kind": kind, **changes})


def measured(plan, budget_of):
    return plan.parameters if budget_of == "trainable" else plan.active_parameters


@pytest.mark.parametrize("budget_of", ["trainable", "active"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    budget=st.integers(25_000, 400_000),
    experts=st.sampled_from([[2, 4, 6, 8], [1, 2, 5, 3], 4, {"from": 6, "to": 1}]),
    shared=st.booleans(),
    top_k=st.integers(1, 3),
)
def test_a_budget_is_met_within_one_expert_rank(kind, budget_of, budget, experts, shared, top_k):
    config = hilo(
        kind,
        budget=budget,
        budget_of=budget_of,
        num_experts=experts,
        share_router=shared,
        top_k=top_k,
        renormalise=False,
    )
    found = mixora.allocate(LLAMA, config, BATCHES)
    plan = mixora.plan(LLAMA, found)
    assert 0 <= budget - measured(plan, budget_of) < ONE_RANK
    assert all(min(site.ranks) >= 1 and max(site.ranks) - min(site.ranks) <= 1 for site in plan.sites)
    assert all(1 <= site.top_k <= site.num_experts == len(site.ranks) for site in plan.sites)
    given_sites = mixora.plan(LLAMA, hilo(num_experts=experts, share_router=shared, top_k=top_k)).sites
    assert sum(s.num_experts for s in plan.sites if s.leader is None) == sum(
        s.num_experts for s in given_sites if s.leader is None
    )


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_with_ranks_that_differ(kind):
    labels = {"decoder_input_ids": IDS, "labels": IDS}
    config = hilo(kind, budget=40_000, num_experts=[2, 3], rank=[2, 3])
    found = mixora.allocate(T5, config, [{"input_ids": IDS, **labels}])
    assert 0 <= 40_000 - mixora.plan(T5, found).parameters < ONE_RANK


def test_without_a_budget_as_many_parameters_as_the_rules_give():
    plain = mixora.plan(LLAMA, hilo())
    assert mixora.allocate(LLAMA, hilo()).allocation is None
    for kind in KINDS[1:]:
        plan = mixora.plan(LLAMA, mixora.allocate(LLAMA, hilo(kind), BATCHES))
        assert 0 <= plain.parameters - plan.parameters < ONE_RANK


def test_groups_and_proportional_keep_their_ratios():
    """Twelve times the budget of the ranks gives twelve times the ranks."""
    plain = mixora.plan(LLAMA, hilo())
    routers = sum(site.num_experts * site.in_features for site in plain.sites)
    budget = 12 * (plain.parameters - routers) + routers
    tall = mixora.plan(LLAMA, hilo(budget=budget))
    assert [site.ranks for site in tall.sites] == [tuple(12 * r for r in site.ranks) for site in plain.sites]
    # rank = number of experts in the preset: proportional is the same plan
    same = mixora.plan(LLAMA, hilo("proportional", budget=budget, rank=5))
    assert [site.ranks for site in same.sites] == [site.ranks for site in tall.sites]


def test_experts_follow_the_weights_as_far_as_asked():
    """With power 0 the numbers stay; with 1 all ranks are about equal and the experts differ."""
    kept = mixora.plan(LLAMA, hilo("spectral", expert_power=0.0))
    assert [s.num_experts for s in kept.sites] == [s.num_experts for s in mixora.plan(LLAMA, hilo()).sites]
    moved = mixora.plan(LLAMA, hilo("spectral", expert_power=1.0, num_experts=8, rank=4))
    assert len({site.num_experts for site in moved.sites}) > 2
    means = [sum(site.ranks) / site.num_experts for site in moved.sites]
    assert max(means) - min(means) < 1.5
    together = mixora.plan(LLAMA, hilo("spectral", share_router=True, num_experts=8))
    by_path = {site.path: site.num_experts for site in together.sites}
    assert all(by_path[site.leader] == site.num_experts for site in together.sites if site.leader)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_every_time_and_the_user_s_config_untouched(kind):
    config = hilo(kind, budget=50_000)
    before = config.to_dict()
    first, second = (mixora.allocate(tiny_llama(layers=4), config, BATCHES).allocation for _ in range(2))
    assert first == second and len(first) == 28
    assert config.to_dict() == before


@pytest.mark.parametrize("kind", ["plain hilo", "plain mola", *KINDS])
def test_trained_saved_and_reloaded_bit_for_bit(kind, tmp_path):
    config = hilo(kind, budget=30_000) if kind in KINDS else mixora.recipe(kind.split()[1], task_type="CAUSAL_LM")
    found = mixora.allocate(LLAMA, config, BATCHES)
    model = adapt(tiny_llama(layers=4), found)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == mixora.plan(LLAMA, found).parameters
    optimiser = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.no_grad():
        expected = model.eval()(input_ids=IDS).logits
    model.save_pretrained(tmp_path)
    # sensitivity has no batches here, and spectral would see other weights: what is stored must serve
    again = mixora.from_pretrained(tiny_llama(layers=4), tmp_path)
    with torch.no_grad():
        assert torch.equal(again.eval()(input_ids=IDS).logits, expected)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["allocation"] == found.allocation
    # unequal ranks need no padding on disk
    tensors = load_file(tmp_path / "adapter_model.safetensors").values()
    assert sum(t.numel() for t in tensors) == mixora.plan(LLAMA, found).parameters
    assert [len(site["ranks"]) for site in stored["plan"]] == [site["num_experts"] for site in stored["plan"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("make", "task", "inputs"),
    [
        (tiny_bert_classifier, "SEQ_CLS", {"input_ids": IDS, "labels": torch.tensor([0, 2])}),
        (tiny_t5, "SEQ_2_SEQ_LM", {"input_ids": IDS, "decoder_input_ids": IDS, "labels": IDS}),
    ],
)
def test_encoders_and_encoder_decoders_reload_bit_for_bit(kind, make, task, inputs, tmp_path):
    sizes = {"num_experts": [2, 3], "rank": [2, 3], "budget": 40_000, "allocator.kind": kind}
    found = mixora.allocate(make(), mixora.recipe("hilo", task_type=task, **sizes), [inputs])
    model = adapt(make(), found)
    model(**inputs).loss.backward()
    trained = [p for name, p in model.named_parameters() if "mixora_" in name]
    assert all(p.grad is not None for p in trained)
    with torch.no_grad():
        expected = model.eval()(**inputs).logits
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(mixora.from_pretrained(make(), tmp_path).eval()(**inputs).logits, expected)


def test_the_stored_allocation_serves_on_other_weights(tmp_path):
    """The spectral allocator would choose otherwise on these."""
    config = hilo("spectral", budget=60_000)
    other = tiny_llama(layers=4)
    with torch.no_grad():
        for layer in other.model.layers[:2]:
            layer.mlp.up_proj.weight.mul_(torch.logspace(0, 3, 48)[:, None])
    model = get_peft_model(tiny_llama(layers=4), config)
    stored = model.peft_config["default"].allocation
    assert config.allocation is None and stored == mixora.allocate(LLAMA, config).allocation
    assert mixora.allocate(other, config).allocation != stored
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(other, tmp_path)
    assert again.peft_config["default"].allocation == stored


def test_an_allocation_for_another_model_is_refused(tmp_path):
    found = mixora.allocate(LLAMA, hilo(budget=60_000))
    assert mixora.allocate(LLAMA, found).allocation == found.allocation
    for use in (mixora.plan, get_peft_model):
        with pytest.raises(ConfigError, match=r"allocation: was made for another model.*7 sites differ.*valid: null"):
            use(tiny_llama(layers=5), found)
    get_peft_model(tiny_llama(layers=4), found).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"another plan"):
        mixora.from_pretrained(tiny_llama(layers=5), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 100}, r"allocator\.budget: got 100; valid for these sites: at least \d+ trainable parameters"),
        ({"budget": 100, "budget_of": "active"}, r"budget: got 100; valid for these sites: at least \d+ active"),
        ({"allocation": {"a": [1, 0]}}, r"allocation\.a\.1: got 0; valid: greater than or equal to 1"),
        ({"allocation": {"a": []}}, r"allocation\.a: got \[\]"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(LLAMA, hilo(**changes))


def test_the_least_that_is_named_is_enough():
    with pytest.raises(ConfigError) as caught:
        mixora.plan(LLAMA, hilo("spectral", budget=100))
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert mixora.plan(LLAMA, hilo("spectral", budget=least)).parameters == least
    with pytest.raises(ConfigError):
        mixora.plan(LLAMA, hilo("spectral", budget=least - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_lora_takes_a_budget_too(kind):
    """One expert at each site, so only the ranks move; GPT-2 keeps its weights the other way round."""
    config = mixora.recipe("lora", budget=9000, **{"allocator.kind": kind})
    plan = mixora.plan(GPT2, mixora.allocate(GPT2, config, BATCHES))
    assert 0 <= 9000 - plan.parameters < 32 + 96
    assert {site.num_experts for site in plan.sites} == {1}


@pytest.mark.parametrize("budget_of", ["trainable", "active"])
@pytest.mark.parametrize(
    ("name", "changes"),
    [("hydralora", {}), ("hydralora", {"num_experts": 3}), ("adamix-lora", {}), ("adamix-lora", {"share": "none"})],
)
def test_experts_that_must_have_one_rank_get_it(name, changes, budget_of):
    config = mixora.recipe(name, budget=30_000, budget_of=budget_of, **changes, **{"allocator.kind": "spectral"})
    plan = mixora.plan(LLAMA, mixora.allocate(LLAMA, config))
    assert all(len(set(site.ranks)) == 1 for site in plan.sites)
    assert len({site.ranks[0] for site in plan.sites}) > 2
    one_step = max(measured(Plan((site,)), budget_of) / site.ranks[0] for site in plan.sites)
    assert 0 <= 30_000 - measured(plan, budget_of) < one_step


def test_progress_is_told():
    seen = []
    mixora.allocate(LLAMA, hilo("sensitivity"), BATCHES, lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_second_adapter_is_allocated_on_the_frozen_weights():
    config = hilo("spectral", budget=50_000)
    model = get_peft_model(tiny_llama(layers=4), config)
    model.add_adapter("second", config)
    assert model.peft_config["second"].allocation == model.peft_config["default"].allocation


PESC = {"rules.ffn.expert.rank": 8, "rules.shared.expert.rank": 4}


@pytest.mark.parametrize("kind", ["spectral", "sensitivity"])
def test_a_whole_module_has_no_weight_to_look_at(kind):
    config = mixora.recipe("pesc", **PESC, **{"allocator.kind": kind})
    message = r"layers\.0\.mlp: is a whole module \(LlamaMLP\) without .*; valid .*: 'groups', 'proportional'$"
    with pytest.raises(ModelError, match=message):
        mixora.plan(tiny_llama(), config)
    with pytest.raises(ModelError, match=message):
        mixora.allocate(tiny_llama(), config, BATCHES)


@pytest.mark.parametrize("kind", ["groups", "proportional"])
def test_the_allocators_that_are_named_then_serve(kind):
    budget = mixora.plan(tiny_llama(), mixora.recipe("pesc", **PESC)).parameters // 2
    config = mixora.recipe("pesc", **PESC, **{"allocator.kind": kind, "budget": budget})
    assert 0.9 * budget < mixora.plan(tiny_llama(), config).parameters <= budget
