"""What the tensors of an adapter are called on disk: the same, whatever stands around them in a model.

An adapter that wraps a feed-forward part puts a `base_layer` into the path of every site inside. Files name tensors as
they are where their adapter is alone on its base.
"""

from typing import Any

from torch import nn

from mixora.errors import CheckpointError
from mixora.host.sharding import gather, is_under_zero
from mixora.mixture import PREFIX, mixtures_of


def as_alone(model: nn.Module, adapter: str, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors `state` of `model` without those of our other adapters, by the keys where `adapter` is alone.

    What is sharded of them becomes whole, in `state` too, from which PEFT goes on to take modules trained whole. Every
    process has to call it then.
    """
    sites = {module.path for module in mixtures_of(model) if adapter in module.parts}
    others = {key for key in state if PREFIX in key and not key.endswith("." + adapter)}
    state.update(gather(model, state, [key for key in state if key not in others and _is_saved(key)]))
    mine = {key: tensor for key, tensor in state.items() if key not in others}
    return {_find_key(key, sites): tensor for key, tensor in mine.items()}


def adapter_state(model: nn.Module) -> dict[str, Any]:
    """Of `model.state_dict()` what adapters may save, whole; every process has to call it."""
    state = model.state_dict()
    return gather(model, state, filter(_is_saved, state))


def _is_saved(key: str) -> bool:
    return "." + PREFIX in key or ".modules_to_save." in key


def as_here(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """The tensors `state` of an adapter by the keys that they have in `model`, which is about to take them.

    Raises `CheckpointError` where DeepSpeed would put its own weights back in the next step.
    """
    if is_under_zero(model):
        raise CheckpointError(
            "an adapter was to be loaded into a model whose weights DeepSpeed's optimiser holds copies of and writes "
            "back in its next step; valid: load it before deepspeed.initialize or Trainer.train"
        )
    wrapped = {module.path for module in mixtures_of(model)}
    return {_find_key(key, wrapped): tensor for key, tensor in state.items()}


def _find_key(key: str, wrapped: set[str]) -> str:
    """The key of a site's tensor in a model where the modules `wrapped` are, whatever was when it was made."""
    path, mark, rest = key.replace(".base_layer", "").partition("." + PREFIX)
    above, peft, site = path.rpartition("base_model.model.")
    if not mark or site not in wrapped:
        return key
    steps = site.split(".")
    for n in reversed(range(1, len(steps))):
        if ".".join(steps[:n]) in wrapped:
            steps.insert(n, "base_layer")
    return above + peft + ".".join(steps) + mark + rest
