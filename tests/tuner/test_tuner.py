"""Recipe `lora` computes what PEFT's LoRA computes."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import mixora
from tests.models import adapt, gradients, tiny_gpt2, tiny_llama, token_ids

IDS = token_ids(2, 8)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(**changes):
    return mixora.recipe("lora", **changes)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS)[0]


def peft_twin(make, targets):
    """mixora's `lora` and PEFT's LoRA with the same weights."""
    ours = adapt(make(), lora(targets=targets, rank=16, alpha=32))
    settings = {"r": 16, "lora_alpha": 32, "target_modules": targets, "fan_in_fan_out": make is tiny_gpt2}
    theirs = get_peft_model(make(), LoraConfig(**settings)).train()
    with torch.no_grad():
        for name, module in theirs.named_modules():
            if hasattr(module, "lora_A"):
                same = ours.get_submodule(name)
                module.lora_A["default"].weight.copy_(same.mixora_A["default"])
                module.lora_B["default"].weight.copy_(same.mixora_B["default"].T)
    return ours, theirs


@pytest.mark.parametrize(("make", "targets"), [(tiny_llama, ATTENTION), (tiny_gpt2, ["c_attn", "c_proj", "c_fc"])])
def test_lora_is_what_peft_computes(make, targets):
    ours, theirs = peft_twin(make, targets)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-6, atol=1e-6)
    found, expected = ([m(input_ids=IDS, labels=IDS).loss.backward(), gradients(m)][1] for m in (ours, theirs))
    assert len(found) == len(expected)
    for name, gradient in found.items():
        twin = name.replace("mixora_A.default", "lora_A.default.weight").replace(
            "mixora_B.default", "lora_B.default.weight"
        )
        want = expected[twin].T if "mixora_B" in name else expected[twin]
        torch.testing.assert_close(gradient, want, rtol=1e-5, atol=1e-6)
