"""Tensors of which each process holds a part (FSDP2, DeepSpeed's ZeRO-3), and how they become whole again.

FSDP2 makes `DTensor`s of parameters; ZeRO-3 leaves them empty between forward passes and marks them by `ds_id`.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

State = dict[str, Any]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process may hold only a part of the parameter `tensor`."""
    return isinstance(tensor, DTensor) or hasattr(tensor, "ds_id")


def gather(model: nn.Module, state: State, keys: Iterable[str]) -> State:
    """The entries `keys` of `state`, which `model.state_dict()` made; what is sharded whole and in the host's memory.

    Tensors are gathered one after the other. Every process has to call it, since all of them give their parts.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {key: _gather_one(state[key], parameters.get(key)) for key in keys}


def _gather_one(value: Any, parameter: Tensor | None) -> Any:
    if isinstance(value, DTensor):
        value = value.full_tensor()
        # on a CPU nothing has waited for it yet
        return (value.wait() if isinstance(value, AsyncCollectiveTensor) else value).cpu()
    if parameter is not None and hasattr(parameter, "ds_shape") and value.shape != parameter.ds_shape:
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().to("cpu", copy=True)
    return value


def is_under_zero(model: nn.Module) -> bool:
    """Whether DeepSpeed's optimiser holds copies of the weights, from which it writes them anew in each step."""
    return any(hasattr(p, "ds_id") or hasattr(p, "_hp_mapping") for p in model.parameters())
