"""What differs between the versions of PEFT, 0.18 to 0.21: no other module asks which one is there."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftType, functional, peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import save_and_load
from torch import nn

State = dict[str, Any]


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


class Tuner(BaseTuner):
    """PEFT's tuner, whose pass runs the hooks of the model: before 0.21, PEFT calls its `forward` past them."""

    # before 0.21.2, PEFT keeps and puts back a method of encoder-decoders that transformers has no more
    _prepare_encoder_decoder_kwargs_for_generation = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def register(
    config: type[PeftConfig],
    tuner: type[BaseTuner],
    prefix: str,
    to_save: Callable[[nn.Module, str, State], State],
    to_load: Callable[[nn.Module, State], State],
) -> None:
    """Make PEFT know the type MIXORA.

    `to_save` (model, adapter, tensors) names tensors as adapter files do, `to_load` (model, tensors) as the model does.
    PEFT asks the tuner for that since 0.21; before, its two functions are wrapped.
    """
    table: Any = peft.mapping
    table.PEFT_TYPE_TO_CONFIG_MAPPING[MIXORA] = config
    table.PEFT_TYPE_TO_TUNER_MAPPING[MIXORA] = tuner
    table.PEFT_TYPE_TO_PREFIX_MAPPING[MIXORA] = prefix
    members: Any = PeftType
    if not hasattr(BaseTuner, "_get_adapter_state_dict") and MIXORA.name not in members._member_map_:
        # such a PEFT saves only what a walk over the enum finds
        members._member_names_.append(MIXORA.name)
        members._member_map_[MIXORA.name] = MIXORA
        _wrap_files(to_save, to_load)


def _wrap_files(
    to_save: Callable[[nn.Module, str, State], State], to_load: Callable[[nn.Module, State], State]
) -> None:
    get, put = save_and_load.get_peft_model_state_dict, save_and_load.set_peft_model_state_dict

    @wraps(get)
    def get_ours(
        model: Any, state_dict: State | None = None, adapter_name: str = "default", *args: Any, **kw: Any
    ) -> Any:
        if model.peft_config[adapter_name].peft_type == MIXORA:
            state_dict = to_save(model, adapter_name, model.state_dict() if state_dict is None else state_dict)
        return get(model, state_dict, adapter_name, *args, **kw)

    @wraps(put)
    def put_ours(model: Any, peft_model_state_dict: State, adapter_name: str = "default", *args: Any, **kw: Any) -> Any:
        if model.peft_config[adapter_name].peft_type == MIXORA:
            peft_model_state_dict = to_load(model, peft_model_state_dict)
        return put(model, peft_model_state_dict, adapter_name, *args, **kw)

    places: tuple[Any, ...] = (peft, peft.utils, functional, peft_model, save_and_load)
    for place in places:
        place.get_peft_model_state_dict = get_ours
        place.set_peft_model_state_dict = put_ours


def device_and_dtype_of(module: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
    """Where a frozen module's weight is and what it computes in, None without a weight; PEFT says so since 0.19."""
    for name in ("weight", "qweight"):
        weight: Any = getattr(module, name, None)
        if weight is not None:
            # 4-bit linears name what they compute in
            return weight.device, getattr(module, "compute_dtype", None) or weight.dtype
    return None, None
