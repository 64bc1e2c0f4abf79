"""Frozen weights in 4 bits, kept in the form that has a gradient."""

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Let bitsandbytes multiply with its 4-bit weights of `model` as it does in training, in evaluation mode too.

    On a CPU with AVX512-BF16 it packs them anew in the first pass in evaluation mode, for a product that has no
    gradient and rounds otherwise: a training after it would silently be wrong, and what is read back would differ.
    """
    module: Any
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                # which unpacks them in their place
                module.state_dict()
