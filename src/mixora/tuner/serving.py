"""Which experts serve a model in evaluation where routes are drawn: their mean, or others for comparison (AdaMix)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from mixora.errors import ConfigError, ModelError
from mixora.mixture import mixtures_of
from mixora.passes.entrances import followed_by
from mixora.routing.draws import serving

Served = Literal["merged", "random", "fixed", "ensemble"]


@contextmanager
def served_by(model: nn.Module, how: Served, *, expert: int = 0, draws: int = 8) -> Iterator[None]:
    """Serve `model` so in evaluation mode while open; training mode is not touched, nor is any weight.

    `merged`: by the mean of the experts, as without this call. `random`: by a route drawn for each pass from the
    ambient generator. `fixed`: by expert number `expert` everywhere. `ensemble`: the logits are the mean over `draws`
    random passes, the output's loss is left out, and texts are generated without a cache. Raises `ConfigError` for a
    model whose routes are not drawn or an expert it does not have, and `ModelError` for an ensemble with a cache.
    """
    if how not in get_args(Served):
        raise ConfigError(f"served by {how!r}; valid: {', '.join(get_args(Served))}")
    counts = {p.router.num_experts for layer in mixtures_of(model) for p in layer.parts.values() if p.router.draws}
    if not counts and how != "merged":
        raise ConfigError(f"served by {how!r}: the model draws no routes; valid: 'merged', or a recipe such as adamix")
    if how == "fixed":
        if not 0 <= expert < min(counts):
            raise ConfigError(f"expert: got {expert}; valid: 0 to {min(counts) - 1}")
        with serving(members=(expert,)):
            yield
    elif how == "ensemble":
        if draws < 1:
            raise ConfigError(f"draws: got {draws}; valid: 1 or more")
        with serving(draws=True), _averaged(model, draws):
            yield
    else:
        with serving(draws=how == "random"):
            yield


@contextmanager
def _averaged(model: Any, draws: int) -> Iterator[None]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def average(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if module.training:
            return output
        if kwargs.get("past_key_values") is not None:
            raise ModelError("an ensemble cannot use a cache, which holds one draw's states; valid: use_cache=False")
        logits = [output["logits"], *(module(*args, **kwargs)["logits"] for _ in range(draws - 1))]
        output["logits"] = torch.stack(logits).mean(dim=0)
        if output.get("loss") is not None:
            output["loss"] = None
        return output

    settings = getattr(base, "generation_config", None)
    kept = getattr(settings, "use_cache", None)
    if settings is not None:
        settings.use_cache = False
    try:
        with followed_by(base, average):
            yield
    finally:
        if settings is not None:
            settings.use_cache = kept
