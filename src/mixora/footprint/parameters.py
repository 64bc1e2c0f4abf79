"""How many parameters a base has, and how many of them a token is computed with."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

# what configurations of transformers call the experts that a token chooses: one number, or a list of each layer's own
CHOSEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")


@dataclass(frozen=True)
class Parameters:
    """Of the base and of the adapter: all of them, and those that one token is computed with."""

    base: int
    active_base: int
    adapter: int
    active_adapter: int


def count_base(model: nn.Module) -> tuple[int, int]:
    """All parameters of an untouched base, and the active ones: of its own mixture's experts the share that is chosen.

    Experts are known by their form in transformers, one parameter for all experts of a layer, the first dimension of
    which is their number.
    """
    own = list(dict.fromkeys(model.parameters()))
    total = sum(p.numel() for p in own)
    chosen = _experts_per_token(model)
    if chosen is None:
        return total, total
    idle = 0
    for path, module in model.named_modules():
        if "Expert" in type(module).__name__:
            experts = [p for p in module.parameters(recurse=False) if p.dim() == 3]
            idle += sum(p.numel() // len(p) * (len(p) - _number_at(path, chosen)) for p in experts)
    return total, total - idle


def _experts_per_token(model: Any) -> Any:
    """By the configuration: a number, a list of numbers by layer, or None without experts."""
    config = getattr(model, "config", None)
    text = None if config is None else config.get_text_config()
    found = (getattr(text, name, None) for name in CHOSEN)
    return next((number for number in found if number is not None), None)


def _number_at(path: str, chosen: Any) -> int:
    """`chosen`, or where it is a list the number of the layer that a module at `path` belongs to."""
    layer = re.search(r"\.(\d+)\.", path)
    return chosen if isinstance(chosen, int) or layer is None else chosen[int(layer[1])]
