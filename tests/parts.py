"""What tests of `mixlora` share: small configurations, inputs for every kind of model, one bare part."""

import torch
from torch import nn

import mixora
from tests.models import token_ids

IDS = token_ids(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])


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
