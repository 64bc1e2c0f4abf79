"""What differs between the versions of PEFT, 0.18 to 0.21: no other module asks which one is there."""

from collections.abc import Callable
from typing import Any

import peft.mapping
import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn


class _PeftType(str):
    """Quacks like a member of the closed enum `peft.PeftType`, which takes no new ones."""

    @property
    def value(self) -> str:
        return str.__str__(self)

    def __str__(self) -> str:
        return f"PeftType.{str.__str__(self)}"

    @property
    def name(self) -> str:
        return str.__str__(self)


MIXORA = _PeftType("MIXORA")
# since 0.21, a tuner says itself how its tensors are named in files
ASKS_TUNER = hasattr(BaseTuner, "_get_adapter_state_dict")
Renaming = Callable[[nn.Module, dict[str, Any]], dict[str, Any]]


def register(config: type[PeftConfig], tuner: type[BaseTuner], prefix: str) -> None:
    """Make PEFT know the type MIXORA."""
    table: Any = peft.mapping
    table.PEFT_TYPE_TO_CONFIG_MAPPING[MIXORA] = config
    table.PEFT_TYPE_TO_TUNER_MAPPING[MIXORA] = tuner
    table.PEFT_TYPE_TO_PREFIX_MAPPING[MIXORA] = prefix
    members: Any = PeftType
    if not ASKS_TUNER and MIXORA.name not in members._member_map_:
        # only what a walk over the enum finds is saved
        members._member_names_.append(MIXORA.name)
        members._member_map_[MIXORA.name] = MIXORA


def rename_keys(model: nn.Module, to_save: Renaming, to_load: Renaming) -> list[Any]:
    """Have PEFT's adapter files name tensors as `to_save` does, and read them as `to_load` does.

    Returns the handles that end it: where the tuner is not asked, the state dict of `model` is renamed.
    """

    def name_saved(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        _replace(state, to_save(module, state))

    def name_loaded(module: nn.Module, state: dict[str, Any], *_: Any) -> None:
        _replace(state, to_load(module, state))

    if ASKS_TUNER:
        return []
    return [model.register_state_dict_post_hook(name_saved), model.register_load_state_dict_pre_hook(name_loaded)]


def _replace(state: dict[str, Any], renamed: dict[str, Any]) -> None:
    state.clear()
    state.update(renamed)


def device_and_dtype_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a frozen module's weight is and what it computes in, None without a weight; PEFT says so since 0.19."""
    for name in ("weight", "qweight"):
        weight: Any = getattr(module, name, None)
        if weight is not None:
            # 4-bit linears name what they compute in
            return weight.device, getattr(module, "compute_dtype", None) or weight.dtype
    return None, None
