"""Adapters of several recipes for one tiny base."""

import torch
from peft import LoraConfig

import mixora
from tests.models import token_ids

IDS = token_ids(2, 8)
SIZES = {"num_experts": 4, "rank": 2, "task_type": "CAUSAL_LM"}
PLAIN = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
ADAPTERS = {
    "sira": mixora.recipe("sira", top_k=2, **SIZES),
    "adamix": mixora.recipe("adamix", **SIZES),
    "pesc": mixora.recipe("pesc", top_k=2, **SIZES),
    "plain": PLAIN,
}


def logits(model, **inputs):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **inputs).logits
