"""The recipe `pesc` on every family of bases: its plan, the start at the dense model, training, files."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import mixora
from mixora.footprint import estimate
from mixora.kernels import KERNELS
from mixora.training.planning import LOSSES
from tests.models import (
    adapt,
    fill,
    gradients,
    tiny_bert_classifier,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_phi,
    tiny_qwen2,
    tiny_qwen3,
    tiny_t5,
    token_ids,
)

IDS = token_ids(2, 8)
# the module that stands for the feed-forward part, how many there are, and the linears of a model that LoRA reaches
FAMILIES = [
    (tiny_llama, "model.layers.0.mlp", 2, 14),
    (tiny_mistral, "model.layers.0.mlp", 2, 14),
    (tiny_qwen2, "model.layers.0.mlp", 2, 14),
    (tiny_qwen3, "model.layers.0.mlp", 2, 14),
    (tiny_gemma, "model.layers.0.mlp", 2, 14),
    (tiny_phi, "model.layers.0.mlp", 2, 12),
    (tiny_gpt2, "transformer.h.0.mlp", 2, 8),
    # BERT's second linear of the part is the wrapped module itself
    (tiny_bert_classifier, "bert.encoder.layer.0.output.dense", 2, 10),
    (tiny_t5, "encoder.block.0.layer.1.DenseReluDense", 4, 32),
]
# kernels for experts behind a module
APART = [name for name, kernel in KERNELS.items() if not kernel.joins]
MAKERS = [family[0] for family in FAMILIES]


def pesc(**changes):
    return mixora.recipe("pesc", **{"num_experts": 4, "rank": 3, **changes})


def batch(model):
    if "SequenceClassification" in type(model).__name__:
        return {"input_ids": IDS, "labels": torch.tensor([0, 2])}
    return {"input_ids": IDS, "labels": IDS}


def logits(model, base):
    with torch.no_grad():
        return model.eval()(**batch(base)).logits


def test_the_recipe_is_as_specified():
    rules = mixora.recipe("pesc").method.rules
    expert, router = rules["ffn"].expert, rules["ffn"].router
    assert (expert.rank, expert.scale, expert.dropout, expert.biases) == (512, 0.25, 0.1, False)
    assert (router.num_experts, router.top_k, router.renormalise, router.expert_dropout) == (8, 2, True, 0.0)
    assert router.capacity.capacity_factor is None
    lora = rules["shared"].expert
    assert (lora.rank, lora.alpha, lora.dropout, rules["shared"].router.kind) == (64, 16.0, 0.1, "single")
    assert mixora.recipe("pesc").method.losses.load_balance.coefficient == 0.01


@pytest.mark.parametrize(("make", "path", "blocks", "linears"), FAMILIES)
def test_the_plan_has_each_feed_forward_part_and_the_shared_linears(make, path, blocks, linears):
    sites = mixora.plan(make(), pesc()).sites
    serial = [site for site in sites if site.expert == "bottleneck"]
    assert serial[0].path == path
    assert (len(serial), len(sites) - len(serial)) == (blocks, linears)
    assert {site.out_features for site in serial} == {32}
    assert serial[0].in_features == (48 if "dense" in path else 32)


@pytest.mark.parametrize("make", MAKERS)
def test_it_starts_as_the_dense_model_and_only_ups_have_a_gradient(make):
    base = make()
    model = get_peft_model(make(), pesc())
    assert torch.equal(logits(model, base), logits(base, base))
    model.train()(**batch(base)).loss.backward()
    moved = {name.rpartition(".mixora_")[2] for name, g in gradients(model).items() if g.abs().max() > 0}
    # the balance loss, which the task's gradient does not need, moves the router as well
    assert moved == {"B.default", "router.default"}
    plain = get_peft_model(make(), pesc(coefficient=0.0)).train()
    plain(**batch(base)).loss.backward()
    assert {n.rpartition(".mixora_")[2] for n, g in gradients(plain).items() if g.abs().max() > 0} == {"B.default"}


@pytest.mark.parametrize("make", MAKERS)
def test_a_training_step_changes_the_model_and_files_keep_every_bit(make, tmp_path):
    base, model = make(), adapt(make(), pesc())
    before = logits(model, base)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch(base)).loss.backward()
    optimiser.step()
    after = logits(model, base)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path), base), after)
    assert torch.equal(logits(mixora.from_pretrained(make(), tmp_path), base), after)


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def test_counts_of_the_7b_model():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32)
    plan = mixora.plan(on_meta(LlamaForCausalLM, config), mixora.recipe("pesc"))
    by_rule = {rule: sum(s.parameters for s in plan.sites if s.rule == rule) for rule in ("ffn", "shared")}
    # adapters 2 E d R L, routers E d L; LoRA 78,080 per rank and layer
    assert by_rule == {"ffn": 1_073_741_824 + 1_048_576, "shared": 159_907_840}
    assert plan.active_parameters == 268_435_456 + 1_048_576 + 159_907_840
    # with the base and LoRA merged: 7.81 billion, 7.01 of them active
    assert 6_738_415_616 + by_rule["ffn"] == 7_813_206_016
    assert 6_738_415_616 + plan.active_parameters - by_rule["shared"] == 7_007_899_648


def test_counts_of_sixteen_experts_on_mistral_7b():
    config = MistralConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_key_value_heads=8)
    model = on_meta(MistralForCausalLM, config)
    plan = mixora.plan(model, mixora.recipe("pesc", num_experts=16, top_k=4))
    serial = [site for site in plan.sites if site.rule == "ffn"]
    assert sum(site.parameters for site in serial) == 2_147_483_648 + 2_097_152
    base = sum(parameter.numel() for parameter in model.parameters())
    assert base + sum(site.parameters for site in serial) == 9_391_312_896
    assert base + sum(site.active_parameters for site in serial) == 7_780_700_160


def test_planned_and_real_numbers_agree():
    model = get_peft_model(tiny_llama(), pesc(biases=True))
    planned = mixora.plan(tiny_llama(), pesc(biases=True)).parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == planned


@pytest.mark.parametrize("kernel", APART)
def test_activation_checkpointing_changes_nothing(kernel):
    found = []
    for checkpointing in (False, True):
        model = adapt(tiny_llama(), pesc(dropout=0.0, rank=8, kernel=kernel))
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-8)


def test_generation_with_and_without_cache_agrees():
    model = fill(get_peft_model(tiny_llama(), pesc()), std=1).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (model.generate(input_ids=IDS, use_cache=flag, **settings) for flag in (True, False))
    assert torch.equal(with_cache, without)


def test_broad_experts_are_computed_where_they_are_chosen():
    """8 experts of rank 512, two of them chosen: R / K is 2048."""
    kernels = {s.rule: s.kernel for s in mixora.plan(tiny_llama(), mixora.recipe("pesc")).sites}
    assert kernels == {"ffn": "sorted", "shared": "joint"}
    small = mixora.plan(tiny_llama(), mixora.recipe("pesc", **{"rules.ffn.expert.rank": 8})).sites
    assert {s.kernel for s in small if s.rule == "ffn"} == {"stacked"}
    named = mixora.plan(tiny_llama(), mixora.recipe("pesc", **{"rules.ffn.kernel": "stacked"})).sites
    assert {s.kernel for s in named if s.rule == "ffn"} == {"stacked"}


@pytest.mark.parametrize("kernel", APART)
def test_memory_is_estimated_with_every_kernel(kernel):
    with torch.device("meta"):
        model = get_peft_model(tiny_llama(), pesc(rank=8, kernel=kernel))
    [found] = estimate(model, 2, 8, LOSSES)
    assert found.memory.activations > 0
