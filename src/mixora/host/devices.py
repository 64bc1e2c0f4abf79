"""What devices are able to do, the meta device among them, on which plans are made and steps are counted."""

import os
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def counts_as_cpu(tensor: Tensor) -> bool:
    """Whether a tensor is on the CPU; one on the meta device counts as on CUDA where there is any."""
    return tensor.device.type == "cpu" or (tensor.is_meta and not torch.cuda.is_available())


def kind_of(tensor: Tensor) -> str:
    """What computes: `cuda`, which other accelerators count as; `amx`, a CPU with matrix units for bf16; or `cpu`."""
    if not counts_as_cpu(tensor):
        return "cuda"
    return "amx" if torch.cpu.get_capabilities().get("amx_bf16") else "cpu"


def is_autocast(device: str) -> bool:
    """Whether autocast is on for a type of device; the meta device knows none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Products of tensors on this one's device keep their dtype, also if backward runs inside of autocast."""
    device = tensor.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def is_triton_interpreted() -> bool:
    """Whether Triton computes on the CPU, step by step: set before the first launch."""
    return os.environ.get("TRITON_INTERPRET") == "1"
