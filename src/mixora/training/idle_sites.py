"""Sites that are planned and made, and that nothing is computed with: they would stay as they began, in silence.

Some models read the weight of a linear past the module (Mamba that of `dt_proj`), and parts of others are not called
for every batch (a tower for images, where a batch has none).
"""

import logging
from typing import Any

from torch import nn
from transformers import TrainerCallback

from mixora.diagnostics.places import name_site
from mixora.diagnostics.verdict import name_some
from mixora.mixture import Mixture, mixtures_of

logger = logging.getLogger("mixora")


def find_idle(model: nn.Module) -> tuple[list[str], int]:
    """Paths of the sites whose parameters have no gradient, and how many sites are trained; after a backward pass."""
    has_gradient = {
        layer.path: any(parameter.grad is not None for parameter in parameters)
        for layer in mixtures_of(model)
        if (parameters := _trained(layer))
    }
    return [path for path, found in has_gradient.items() if not found], len(has_gradient)


def _trained(layer: Mixture) -> list[nn.Parameter]:
    """Of the site itself; the frozen module may hold sites of its own."""
    return [p for name, p in layer.named_parameters() if p.requires_grad and not name.startswith("base_layer.")]


class IdleSites(TrainerCallback):
    """Looks at the gradients of the first step; `note` says what it found, and a warning was logged."""

    def __init__(self) -> None:
        self.note: str | None = None
        self._has_looked = False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Where no site has a gradient, they are kept elsewhere, as DeepSpeed's are."""
        if self._has_looked:
            return
        self._has_looked = True
        idle, count = find_idle(kwargs["model"])
        if 0 < len(idle) < count:
            self.note = (
                f"{len(idle)} of {count} sites got no gradient in the first step ({name_some(map(name_site, idle))}): "
                "the model did not call them, or reads their weights past the module, and then they learn nothing. "
                "Name other targets."
            )
            if state.is_world_process_zero:
                logger.warning("%s", self.note)
