"""How many parameters a base has, and how many of them a token is computed with."""

from dataclasses import dataclass
from typing import Any

from torch import nn


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
    for module in model.modules():
        if "Expert" in type(module).__name__:
            experts = [p for p in module.parameters(recurse=False) if p.dim() == 3]
            idle += sum(p.numel() // len(p) * (len(p) - chosen) for p in experts)
    return total, total - idle


def _experts_per_token(model: Any) -> int | None:
    config = getattr(model, "config", None)
    return None if config is None else getattr(config.get_text_config(), "num_experts_per_tok", None)
