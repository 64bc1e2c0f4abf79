"""The recipe `mixlora` on every family of bases: its plan, the start at the base, training, files, what it refuses."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification

import mixora
from mixora.errors import ConfigError, MixoraError, ModelError
from mixora.passes import tracing
from mixora.training.trainers import auxiliary_loss, mixtures_of
from tests.models import (
    adapt,
    fill,
    gradients,
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
    token_ids,
)

IDS = token_ids(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


def gated_t5():
    return tiny_t5(feed_forward_proj="gated-gelu")


def tiny_albert():
    """One block for all layers: its feed-forward part runs twice in a pass."""
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    return AlbertForSequenceClassification(
        AlbertConfig(vocab_size=64, num_hidden_layers=2, num_labels=3, **sizes, **no_dropout)
    )


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


def mixlora(**changes):
    return mixora.recipe("mixlora", **{"num_experts": 4, "rules.ffn.expert.rank": 3, **changes})


def ffn_only(**changes):
    """The rule for the feed-forward parts alone."""
    config = mixlora(**changes)
    return mixora.MixoraConfig(rules={"ffn": config.rules["ffn"]}, losses=config.losses)


def with_router(router, kind="ffn_lora"):
    rule = {"targets": ["feed-forward"], "expert": {"kind": kind, "rank": 3}, "router": router}
    return mixora.MixoraConfig(rules={"ffn": rule})


def batch(base):
    if base.main_input_name == "pixel_values":
        pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2])}
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    if "SequenceClassification" in type(base).__name__:
        return {**inputs, "labels": torch.tensor([0, 2])}
    return {**inputs, "labels": IDS.masked_fill(MASK == 0, -100)}


def logits(model, base):
    with torch.no_grad():
        return model.eval()(**batch(base)).logits


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
    from transformers import LlamaConfig, LlamaForCausalLM

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


@pytest.mark.parametrize("kernel", ["loop", "stacked"])
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


@pytest.mark.parametrize("kernel", ["loop", "stacked"])
def test_an_empty_batch(kernel):
    model = adapt(Part(), ffn_only(kernel=kernel))
    x_BSI = torch.zeros(0, 5, 6, requires_grad=True)
    y_BSO = model(x_BSI)
    assert y_BSO.shape == (0, 5, 6)
    y_BSO.sum().backward()
    assert x_BSI.grad.shape == (0, 5, 6)


def test_a_token_whose_experts_are_all_dropped_keeps_the_frozen_part():
    model, base = adapt(Part(), ffn_only(expert_dropout=0.97)), Part()
    x_BSI = torch.randn(4, 50, 6, generator=torch.Generator().manual_seed(2))
    with tracing() as trace:
        y_BSO = model(x_BSI)
    (routing,) = trace.of("layers.0.gate_proj")
    is_left = (routing.weights_TK == 0).all(dim=1).reshape(4, 50)
    assert 0 < is_left.sum() < 200
    torch.testing.assert_close(y_BSO[is_left], base(x_BSI)[is_left])
    assert ((y_BSO - base(x_BSI)).abs().amax(dim=-1)[~is_left] > 1e-4).all()


def test_disabled_it_is_the_base_and_unloading_gives_the_base_back():
    base, model = tiny_llama(), adapt(tiny_llama(), mixlora())
    with model.disable_adapter():
        assert torch.equal(logits(model, base), logits(base, base))
    assert not torch.equal(logits(model, base), logits(base, base))
    assert torch.equal(logits(model.unload(), base), logits(base, base))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_before_a_weight_is_changed(merge):
    base, model = tiny_llama(), adapt(tiny_llama(), mixlora())
    before = logits(model, base)
    message = r"mlp\.gate_proj: cannot be merged: its experts go through the feed-forward part, with a non-linearity"
    with pytest.raises(MixoraError, match=message):
        getattr(model, merge)()
    assert torch.equal(logits(model, base), before)


def test_merging_a_single_expert_is_refused_too():
    model = adapt(Part(), with_router({"kind": "single"}))
    assert not model.base_model.model.layers[0].gate_proj.supports_lora_conversion()
    with pytest.raises(MixoraError, match="cannot be merged"):
        model.merge_and_unload()


def test_a_single_expert_is_plain_lora():
    kinds = ("ffn_lora", "lora")
    one, other = (adapt(tiny_llama(), with_router({"kind": "single"}, kind)) for kind in kinds)
    torch.testing.assert_close(logits(one, tiny_llama()), logits(other, tiny_llama()))


def test_two_active_adapters_of_which_one_spans_the_part_are_refused():
    model = adapt(tiny_llama(), mixlora())
    model.add_adapter("second", mixora.recipe("lora", targets=["down_proj"]))
    # one at a time they work
    model.set_adapter("second")
    logits(model, tiny_llama())
    model.set_adapter("default")
    logits(model, tiny_llama())
    model.base_model.set_adapter(["default", "second"])
    message = (
        r"layers\.0\.mlp\.down_proj: the experts of adapter 'default' go through .* 'second' is active or merged too"
    )
    with pytest.raises(ModelError, match=message):
        logits(model, tiny_llama())


def test_adapters_elsewhere_may_be_active_too():
    model = adapt(tiny_llama(), ffn_only())
    model.add_adapter("second", mixora.recipe("lora"))
    model.base_model.set_adapter(["default", "second"])
    fill(model)
    both = logits(model, tiny_llama())
    for name in ("default", "second"):
        model.set_adapter(name)
        assert not torch.equal(logits(model, tiny_llama()), both)


def test_an_adapter_merged_into_the_part_is_refused():
    model = adapt(tiny_llama(), mixora.recipe("lora", targets=["up_proj"]))
    model.add_adapter("second", mixlora())
    model.set_adapter("second")
    model.merge_adapter(["default"])
    with pytest.raises(ModelError, match=r"adapter 'second' go through .* 'default' is active or merged too"):
        logits(model, tiny_llama())


def test_pesc_around_the_part_works_together_with_it():
    rules = {"whole": mixora.recipe("pesc", rank=3).rules["ffn"], "ffn": mixlora().rules["ffn"]}
    base, config = tiny_llama(), mixora.MixoraConfig(rules=rules)
    model = get_peft_model(tiny_llama(), config)
    assert torch.equal(logits(model, base), logits(base, base))
    fill(model).train()(**batch(base)).loss.backward()
    assert len(gradients(model)) == sum(p.requires_grad for p in model.parameters())


class Part(nn.Module):
    """One gated feed-forward part, run in ways that a model may choose."""

    def __init__(self, run=lambda b, x: b.down_proj(torch.tanh(b.gate_proj(x)) * b.up_proj(x))):
        super().__init__()
        torch.manual_seed(0)
        linears = {"gate_proj": nn.Linear(6, 9), "up_proj": nn.Linear(6, 9), "down_proj": nn.Linear(9, 6)}
        self.layers = nn.ModuleList([nn.ModuleDict(linears)])
        self.run = run

    def forward(self, x):
        block = self.layers[0]
        return self.run(_Names(block), x)


class _Names:
    def __init__(self, block):
        self.block = block

    def __getattr__(self, name):
        return self.block[name]


def test_the_order_in_which_the_first_linears_run_does_not_matter():
    x_BSI = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(2))
    found = []
    for run in (
        lambda b, x: b.down_proj(torch.tanh(b.gate_proj(x)) * b.up_proj(x)),
        lambda b, x: b.down_proj(b.up_proj(x) * torch.tanh(b.gate_proj(x))),
    ):
        torch.manual_seed(1)
        model = adapt(Part(run), ffn_only(expert_dropout=0.3, dropout=0.0))
        torch.manual_seed(2)
        with tracing() as trace:
            y_BSO = model(x_BSI)
        assert [o.path for o in trace.observations] == ["layers.0.gate_proj"]
        y_BSO.square().sum().backward()
        found.append((y_BSO, *gradients(model).values()))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


BROKEN = [
    # the last linear alone, one of the first ones missing, two inputs, a hidden state that lost tokens
    (lambda b, x: b.down_proj(torch.cat([x, x[..., :3]], dim=-1)), "ends a feed-forward part, but layers.0.gate_proj"),
    (lambda b, x: b.down_proj(b.gate_proj(x)), "did not all read one input before it in this pass"),
    (lambda b, x: b.down_proj(b.gate_proj(x) * b.up_proj(x + 1)), "did not all read one input before it in this pass"),
    (lambda b, x: b.down_proj((b.gate_proj(x) * b.up_proj(x))[:, 1:]), r"shape \[4, 4, 9\], .* began with 2 slots for"),
]


@pytest.mark.parametrize(("run", "message"), BROKEN)
def test_models_that_do_not_run_the_part_as_one(run, message):
    with pytest.raises(ModelError, match=message):
        adapt(Part(run), ffn_only())(torch.randn(2, 5, 6))


def test_a_linear_called_outside_of_a_pass_says_so():
    model = adapt(tiny_llama(), mixlora())
    with pytest.raises(ModelError, match="valid: a forward pass of the whole model"):
        model.base_model.model.model.layers[0].mlp(torch.randn(1, 3, 32))


class Odd(nn.Module):
    """Blocks whose linears are no feed-forward part."""

    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(*size) for size in sizes])])


MISTAKES = [
    (
        tiny_llama,
        {"rules.ffn.targets": ["up_proj", "down_proj"]},
        r"leaves out model\.layers\.0\.mlp\.gate_proj; valid: ",
    ),
    (tiny_llama, {"rules.ffn.targets": r".*\.1\.mlp\.(gate|up)_proj"}, r"leaves out model\.layers\.1\.mlp\.down_proj"),
    (tiny_llama, {"rules.ffn.targets": ["lm_head"]}, r"rules\.ffn\.targets: lm_head belongs to no feed-forward part"),
    (
        tiny_llama,
        {"rules.ffn.targets": ["all-linear"], "rules.attention.targets": ["lm_head"]},
        r"rules\.ffn\.targets: model\.layers\.0\.self_attn\.q_proj belongs to no feed-forward part",
    ),
    (tiny_llama, {"renormalise": False}, r"rules\.ffn\.router: got a 'topk' router whose weights need not sum to 1"),
    (tiny_llama, {"capacity_factor": 1.5}, r"valid: 'topk' with renormalise and without capacity_factor"),
    (tiny_llama, {"share_router": True}, r"rules\.ffn\.router\.share_router: got true, but experts of kind 'ffn_lora'"),
]


@pytest.mark.parametrize(("make", "changes", "message"), MISTAKES)
def test_rules_that_cannot_be_met(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(make(), mixlora(**changes))


@pytest.mark.parametrize(
    "sizes",
    [
        [(6, 9)],  # no last linear
        [(6, 9), (9, 5)],  # the last does not give back what the first reads
        [(6, 9), (9, 6), (6, 1)],  # a gate beside it
        [(6, 9), (9, 6), (6, 9), (9, 6)],  # two parts in one block
        [(6, 9), (5, 9), (9, 6)],  # the first linears read two inputs
    ],
)
def test_blocks_without_the_structure(sizes):
    listed = ", ".join(f"{n} {i} x {o}" for n, (i, o) in enumerate(sizes))
    with pytest.raises(
        ConfigError, match=rf"layers\.0 has no feed-forward part .*: {listed}; valid: linears that read"
    ):
        mixora.plan(Odd(*sizes), ffn_only())


@pytest.mark.parametrize(
    ("sizes", "roles"),
    [
        ([(6, 9), (9, 6), (6, 9)], ["first", "last", "first"]),  # the last linear is not the last one of the model
        ([(6, 6), (6, 6), (6, 6)], ["first", "first", "last"]),  # widths tell nothing: the order does
        ([(6, 18), (9, 6)], ["first", "last"]),
    ],
)
def test_roles_by_widths(sizes, roles):
    assert [site.role for site in mixora.plan(Odd(*sizes), ffn_only()).sites] == roles


def test_one_part_has_one_number_of_experts():
    names = ("gate_proj", "up_proj", "down_proj")
    ranks = {f"layers.0.{name}": (2, 2, 2) if name == "up_proj" else (2, 2) for name in names}
    config = mixora.MixoraConfig(rules=ffn_only().rules, allocation=ranks)
    with pytest.raises(
        ConfigError, match=r"gives layers\.0\.up_proj 3 experts, where the first linear .* has 2; valid"
    ):
        mixora.plan(Part(), config)


def test_broad_experts_are_computed_one_by_one():
    """Each choice of a token has a row of its own: the breadth is the sum of ranks."""
    for rank, kernel in ((25, "stacked"), (26, "loop")):
        sites = mixora.plan(tiny_llama(), mixora.recipe("mixlora", **{"rules.ffn.expert.rank": rank})).sites
        assert {site.kernel for site in sites if site.rule == "ffn"} == {kernel}
