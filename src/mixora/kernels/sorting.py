"""What kernels that sort their slots by expert have in common."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mixora.contracts import Kernel
from mixora.host.devices import is_autocast
from mixora.routing import Routing


def sort_by_expert(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Places of the flattened slots with those of each expert next to each other, and how many each expert has.

    Slots whose expert is `num_experts` belong to none: they come last and are not counted. int64 [T * K] and int64 [E];
    tokens of one expert keep their order. Does not wait for the device.
    """
    expert_N = experts_TK.flatten()
    counts = expert_N.new_zeros(num_experts + 1).index_add_(0, expert_N, torch.ones_like(expert_N))
    return expert_N.argsort(stable=True), counts[:num_experts]


class SortingKernel(Kernel):
    """Its slots are a dataclass; `place_N` says where each stands in the flattened [T, K], `token_N` whose it is."""

    def by_slot(self, slots: Any, routing: Routing) -> Any:
        """The k-th slot of token t becomes that of token k T + t."""
        tokens, top_k = routing.experts_TK.shape
        place_N = slots.place_N % top_k * tokens + slots.place_N // top_k
        return replace(slots, place_N=place_N, token_N=place_N)

    def by_token(self, slots: Any, routing: Routing) -> Any:
        """The slot of token k T + t becomes the k-th of token t."""
        tokens, top_k = routing.experts_TK.shape
        place_N = slots.place_N % tokens * top_k + slots.place_N // tokens
        return replace(slots, place_N=place_N, token_N=place_N // top_k)


def cast_as_autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype that autocast gives a matrix product; itself where autocast is off."""
    device_type = tensor.device.type
    if not is_autocast(device_type) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device_type))
