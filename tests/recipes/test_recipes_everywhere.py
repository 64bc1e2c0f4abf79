"""Every recipe with its own settings on every kind of base: the plan, its numbers, the memory."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

import mixora
from mixora.footprint import estimate
from mixora.training.planning import LOSSES
from tests.models import adapt, tiny_bert_classifier, tiny_llama, tiny_t5, token_ids

IDS = token_ids(4, 8)
MASK = torch.tensor([[1] * 8, [1] * 8, [1] * 5 + [0] * 3, [1] * 6 + [0] * 2])
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
CLASSES = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 1, 2, 1])}
# hilo and mola have values for four groups of layers
LAYERS = 4
KINDS = {
    "decoder": (tiny_llama, "CAUSAL_LM", TEXT),
    "encoder": (tiny_bert_classifier, "SEQ_CLS", CLASSES),
    "encoder-decoder": (tiny_t5, "SEQ_2_SEQ_LM", TEXT),
}


@pytest.mark.parametrize("recipe", mixora.recipe_names())
def test_the_plan_is_printed_and_true_on_every_kind(recipe):
    for make, _, batch in KINDS.values():
        plan = mixora.plan(make(LAYERS), mixora.recipe(recipe))
        assert f"trainable {plan.parameters:,}, active {plan.active_parameters:,} parameters" in str(plan)
        model = get_peft_model(make(LAYERS), mixora.recipe(recipe))
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == plan.parameters
        sites = mixora.inspect(model, batch)
        # sites that share a router are told once
        assert {site["path"] for site in sites} == {site.path for site in plan.sites if site.leader is None}


# tiny Llama, two layers of q, k, v, o: 32 wide, of which k and v give 16
COUNTS = {
    # rank 16: q, o 16 * 64; k, v 16 * 48
    "lora": (2 * 2 * (1024 + 768), 2 * 2 * (1024 + 768)),
    # 16 experts of rank 4, 4 of them active: 64 * 64, 64 * 48, router 16 * 32
    "sira": (2 * 2 * (4096 + 3072 + 2 * 512), 2 * 2 * (1024 + 768 + 2 * 512)),
    # 8 experts of rank 4, all active: 32 * 64, 32 * 48, router 8 * 32
    "molora": (2 * 2 * (2048 + 1536 + 2 * 256), 2 * 2 * (2048 + 1536 + 2 * 256)),
    # A 8 * 32 once; B of 4 experts of rank 8: 32 * 32, 32 * 16; router 4 * 32
    "hydralora": (2 * 2 * (1024 + 512 + 2 * (256 + 128)), 2 * 2 * (1024 + 512 + 2 * (256 + 128))),
    # as molora, and a threshold of 32 + 1 numbers
    "adamole": (2 * 2 * (2048 + 1536 + 2 * (256 + 33)), 2 * 2 * (2048 + 1536 + 2 * (256 + 33))),
    # as molora, with 8 more rows in the router, and 4 experts active at most
    "adamoe": (2 * 2 * (2048 + 1536 + 2 * 512), 2 * 2 * (1024 + 768 + 2 * 512)),
    # 4 downs of 16 * 32 + 16, one up of 16 * 32 + 32; one of each is served
    "adamix": (2 * (4 * 528 + 544), 2 * (528 + 544)),
    # on q and v: 8 downs of 4 * 32, one up of 4 * 32 and 4 * 16
    "adamix-lora": (2 * (2 * 8 * 128 + 128 + 64), 2 * (2 * 128 + 128 + 64)),
    # gate, up, down: 8 experts of rank 16, 2 of them active: 128 * 80, 32 * 80; one router 8 * 32; the lora above
    "mixlora": (2 * (3 * 10240 + 256 + 2 * (1024 + 768)), 2 * (3 * 2560 + 256 + 2 * (1024 + 768))),
}


@pytest.mark.parametrize("recipe", COUNTS)
def test_counts_by_hand(recipe):
    plan = mixora.plan(tiny_llama(), mixora.recipe(recipe))
    assert (plan.parameters, plan.active_parameters) == COUNTS[recipe]


# SmolLM2-135M: 30 layers, 576 wide, of which k and v give 192; the numbers that docs/methods/ tells
LARGE_COUNTS = {
    "sira": (8_478_720, 2_949_120),
    "molora": (4_239_360, 4_239_360),
    "hydralora": (2_304_000, 2_304_000),
    "adamole": (4_308_600, 4_308_600),
    "adamoe": (4_792_320, 2_949_120),
    "adamix": (1_401_600, 570_720),
    "adamix-lora": (1_198_080, 230_400),
    # 30 * (3 * 128 * 2112 + 8 * 576 + 16 * (2 * 1152 + 2 * 768)); 32 for 128 where active
    "mixlora": (26_311_680, 8_064_000),
}


@pytest.mark.parametrize("recipe", LARGE_COUNTS)
def test_counts_of_the_documentation(recipe):
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    with torch.device("meta"):
        plan = mixora.plan(tiny_llama(layers=30, **sizes), mixora.recipe(recipe))
    assert (plan.parameters, plan.active_parameters) == LARGE_COUNTS[recipe]


@pytest.mark.parametrize("recipe", mixora.recipe_names())
def test_memory_is_counted_without_weights(recipe):
    with torch.device("meta"):
        model = get_peft_model(tiny_llama(LAYERS), mixora.recipe(recipe))
    [found] = estimate(model, 2, 8, LOSSES)
    assert found.memory.activations > 0


class Pieces(nn.Module):
    """The linears of Llama's blocks without attention, which has no answer for no tokens."""

    def __init__(self):
        super().__init__()
        self.layers = tiny_llama(LAYERS).model.layers

    def forward(self, x):
        for block in self.layers:
            attention = block.self_attn
            heads = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=-1)
            x = block.mlp(attention.o_proj(heads[..., :32]) + heads[..., 32:])
        return x


@pytest.mark.parametrize("shape", [(0, 32), (1, 0, 32), (0, 3, 32)])
@pytest.mark.parametrize("recipe", mixora.recipe_names())
def test_no_tokens_at_all(recipe, shape):
    """As the linears in a model's own mixture get them: nothing comes out, and no gradient is left behind."""
    coefficient = {"losses.consistency.coefficient": 0.0} if recipe.startswith("adamix") else {}
    model = adapt(Pieces(), mixora.recipe(recipe, **coefficient))
    for training in (True, False):
        x = torch.zeros(shape, requires_grad=True)
        y = model.train(training)(x)
        assert y.shape == shape
        y.sum().backward()
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    with torch.no_grad():
        assert model(x).shape == shape
