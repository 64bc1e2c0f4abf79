"""The recipe `mixlora` on every family of bases: its plan, the start at the base, training, files."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import mixora
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from mixora.training.batch_loss import auxiliary_loss
from tests.models import (
    adapt,
    fill,
    gradients,
    tiny_albert,
    tiny_bert_classifier,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_mistral,
    tiny_opt,
    tiny_phi,
    tiny_phi3,
    tiny_qwen2,
    tiny_qwen3,
    tiny_t5,
    tiny_vit,
)
from tests.parts import IDS, MASK, batch, logits, mixlora


def gated_t5():
    return tiny_t5(feed_forward_proj="gated-gelu")


# how many feed-forward parts, and the linears of the first one, the last one last
LLAMA = (2, "model.layers.0.mlp", ("gate_proj", "up_proj", "down_proj"))
FAMILIES = [
    (tiny_llama, *LLAMA),
    (tiny_mistral, *LLAMA),
    (tiny_qwen2, *LLAMA),
    (tiny_qwen3, *LLAMA),
    (tiny_gemma, *LLAMA),
    (tiny_phi, 2, "model.layers.0.mlp", ("fc1", "fc2")),
    (tiny_phi3, 2, "model.layers.0.mlp", ("gate_up_proj", "down_proj")),
    (tiny_gpt2, 2, "transformer.h.0.mlp", ("c_fc", "c_proj")),
    (tiny_bert_classifier, 2, "bert.encoder.layer.0", ("intermediate.dense", "output.dense")),
    (tiny_albert, 1, "albert.encoder.albert_layer_groups.0.albert_layers.0", ("ffn", "ffn_output")),
    (tiny_t5, 4, "encoder.block.0.layer.1.DenseReluDense", ("wi", "wo")),
    (gated_t5, 4, "encoder.block.0.layer.1.DenseReluDense", ("wi_0", "wi_1", "wo")),
    (tiny_opt, 2, "model.decoder.layers.0", ("fc1", "fc2")),
    (tiny_vit, 2, "vit.layers.0.mlp", ("fc1", "fc2")),
]
MAKERS = [family[0] for family in FAMILIES]
DECODERS = [tiny_llama, tiny_gpt2, tiny_phi3, tiny_opt]


def test_the_recipe_is_as_specified():
    method = mixora.recipe("mixlora").method
    expert, router = method.rules["ffn"].expert, method.rules["ffn"].router
    assert (expert.kind, expert.rank, expert.alpha, expert.dropout) == ("ffn_lora", 16, 32.0, 0.05)
    assert (router.num_experts, router.top_k, router.renormalise, router.expert_dropout) == (8, 2, True, 0.0)
    lora = method.rules["attention"].expert
    assert (lora.kind, lora.rank, lora.alpha, lora.dropout) == ("lora", 16, 32.0, 0.05)
    assert method.rules["attention"].router.kind == "single"
    assert method.losses.load_balance.coefficient == 0.01


@pytest.mark.parametrize(("make", "parts", "place", "names"), FAMILIES)
def test_the_plan_knows_each_part_and_its_router(make, parts, place, names):
    sites = [site for site in mixora.plan(make(), mixlora()).sites if site.rule == "ffn"]
    assert len(sites) == parts * len(names)
    paths = [f"{place}.{name}" for name in names]
    assert [site.path for site in sites[: len(names)]] == paths
    assert [site.role for site in sites[: len(names)]] == ["first"] * (len(names) - 1) + ["last"]
    assert [site.leader for site in sites[: len(names)]] == [None] + paths[:1] * (len(names) - 1)
    assert [site.out_features for site in sites if site.role == "last"] == [32] * parts


@pytest.mark.parametrize("make", MAKERS)
def test_it_starts_as_the_base_and_only_what_is_zero_has_a_gradient(make):
    base, model = make(), get_peft_model(make(), mixlora(dropout=0.0))
    assert torch.equal(logits(model, base), logits(base, base))
    model.train()(**batch(base)).loss.backward()
    moved = {name.rpartition(".mixora_")[2] for name, g in gradients(model).items() if g.abs().max() > 0}
    # the routers by their balance loss
    assert moved == {"B.default", "router.default"}


@pytest.mark.parametrize("make", MAKERS)
def test_a_training_step_changes_the_model_and_files_keep_every_bit(make, tmp_path):
    base, model = make(), adapt(make(), mixlora())
    before = logits(model, base)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**batch(base)).loss.backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in trainable.values())
    optimiser.step()
    after = logits(model, base)
    assert not torch.equal(after, before)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert torch.equal(logits(PeftModel.from_pretrained(make(), tmp_path), base), after)
    assert torch.equal(logits(mixora.from_pretrained(make(), tmp_path), base), after)


@pytest.mark.parametrize("make", [make for make in MAKERS if make not in (tiny_t5, gated_t5, tiny_vit)])
def test_what_stands_on_padding_does_not_matter(make):
    """A padded row and the same row alone: logits of real tokens, balance losses."""
    model = adapt(make(), mixlora()).eval()
    with torch.no_grad(), tracing() as padded:
        together = model(input_ids=IDS, attention_mask=MASK).logits[1]
    with torch.no_grad(), tracing() as alone:
        single = model(input_ids=IDS[1:, :5], attention_mask=MASK[1:, :5]).logits[0]
    torch.testing.assert_close(together[:5] if together.dim() > 1 else together, single, rtol=1e-4, atol=1e-5)
    for one, other in zip(padded.observations, alone.observations, strict=True):
        assert one.routing.assigned_TK[8:].sum() == other.routing.assigned_TK.sum()


def test_numbers_of_the_7b_model():
    """Per rank and expert 2 (4096 + 11008) + 11008 + 4096 in each part; attention 4 * 2 * 4096 per rank."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    plan = mixora.plan(model, mixora.recipe("mixlora"))
    experts, routers, attention = 32 * 8 * 16 * 45312, 32 * 8 * 4096, 32 * 16 * 32768
    assert plan.parameters == experts + routers + attention == 203_423_744
    assert plan.active_parameters == experts // 4 + routers + attention


@pytest.mark.parametrize("changes", [{}, {"alpha": 4.0, "rank": 5}])
def test_planned_and_real_numbers_agree(changes):
    model = get_peft_model(tiny_llama(), mixlora(**changes))
    planned = mixora.plan(tiny_llama(), mixlora(**changes)).parameters
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == planned
    routers = [name for name, _ in model.named_parameters() if "router" in name]
    assert [name.split(".")[-3] for name in routers] == ["gate_proj"] * 2


def test_the_table_marks_who_has_the_router():
    text = str(mixora.plan(tiny_llama(), mixlora()))
    assert text.count("(shared)") == 2


def test_a_budget_gives_experts_of_unequal_rank():
    config = mixlora(**{"allocator.kind": "proportional", "allocator.budget": 15_000})
    model = adapt(tiny_llama(), config)
    ranks = {rank for layer in mixtures_of(model) for rank in layer.parts["default"].shape.ranks}
    assert len(ranks) > 1
    model(**batch(tiny_llama())).loss.backward()
    assert len(gradients(model)) == sum(p.requires_grad for p in model.parameters())


def test_each_part_is_told_and_its_loss_counted_once():
    model = adapt(tiny_llama(), mixlora())
    with tracing(owns_losses=True) as trace:
        model(**batch(tiny_llama()))
    routed = [o for o in trace.observations if o.routing.num_experts > 1]
    assert [o.path for o in routed] == ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj"]
    total, _ = auxiliary_loss(model, trace)
    balances = []
    for seen in routed:
        probs, chosen = seen.routing.probs_TE[MASK.flatten() == 1], seen.routing.experts_TK[MASK.flatten() == 1]
        share = torch.bincount(chosen.flatten(), minlength=4) / chosen.numel()
        balances.append(4 * (share * probs.mean(dim=0)).sum())
    torch.testing.assert_close(total, 0.01 * sum(balances) / 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("make", [tiny_llama, tiny_bert_classifier, tiny_t5])
def test_activation_checkpointing_changes_nothing(make, use_reentrant):
    found = []
    for checkpointing in (False, True):
        # in float64: T5's own rounding would hide what differs
        model = adapt(make(), mixlora()).double()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        for _ in range(2):
            model(**batch(make())).loss.backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", DECODERS)
def test_generation_with_and_without_cache_agrees(make):
    model = fill(get_peft_model(make(), mixlora()), std=1).eval()
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache, without = (
        model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), use_cache=flag, **settings)
        for flag in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
@pytest.mark.parametrize("form", ["bf16", "autocast"])
def test_low_precision(form, kernel):
    base, model = tiny_llama(), adapt(tiny_llama(), mixlora(kernel=kernel, dropout=0.0))
    exact = model(**batch(base))
    model = model.to(torch.bfloat16) if form == "bf16" else model
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
        found = model(**batch(base))
    found.loss.backward()
    assert found.logits.dtype == torch.bfloat16
    torch.testing.assert_close(found.loss.float(), exact.loss, rtol=0.05, atol=0.05)
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


@pytest.mark.parametrize("form", ["bf16", "autocast"])
def test_it_starts_as_the_base_in_low_precision(form):
    base, model = tiny_llama(), get_peft_model(tiny_llama(), mixlora())
    if form == "bf16":
        base, model = base.to(torch.bfloat16), model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
        assert torch.equal(logits(model, base), logits(base, base))
