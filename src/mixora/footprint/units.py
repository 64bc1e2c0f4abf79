"""The parts of a model that strategies shard as one: its repeated blocks, and what is left."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together. `module`: None for the root unit, which holds what no block does."""

    module: nn.Module | None
    parameters: tuple[nn.Parameter, ...]

    @property
    def trained(self) -> tuple[nn.Parameter, ...]:
        """Those with a gradient."""
        return tuple(p for p in self.parameters if p.requires_grad)


def split_into_units(model: nn.Module) -> list[Unit]:
    """The root unit, then the blocks in the model's order; no parameter twice.

    Blocks are the modules that transformers says not to split (`_no_split_modules`), which is also how accelerate
    wraps for FSDP2 by default.
    """
    whole: Any = model
    base = whole.get_base_model() if hasattr(model, "get_base_model") else whole
    names = set(getattr(base, "_no_split_modules", None) or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    seen: set[nn.Parameter] = set()
    units = [Unit(block, _unseen(block.parameters(), seen)) for block in blocks]
    return [Unit(None, _unseen(model.parameters(), seen)), *units]


def _unseen(parameters: Iterable[nn.Parameter], seen: set[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    fresh = tuple(dict.fromkeys(p for p in parameters if p not in seen))
    seen.update(fresh)
    return fresh
