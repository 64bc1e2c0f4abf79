"""The processes that train together: how many there are, and sums over all of them."""

from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

Nest = TypeVar("Nest")


def count_processes() -> int:
    """1 where no process group is open."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """From 0 on; 0 where no process group is open."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def sum_over_processes(nest: Nest) -> Nest:
    """Each tensor in lists, tuples and dicts summed over all processes, which must all give the same shapes.

    One collective for all of them; none where there is one process or no tensor.

    Data-parallel training takes the mean of the processes' gradients. So the gradient of a sum reaches this process's
    part times the number of processes, without a further collective: the mean is then that of the sum.
    """
    parts, form = tree_flatten(nest)
    if not parts or count_processes() == 1:
        return nest
    flat = _Sum.apply(torch.cat([part.flatten().to(parts[0].device) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    sums = [piece.reshape(part.shape).to(part) for piece, part in zip(pieces, parts, strict=True)]
    return tree_unflatten(sums, form)


class _Sum(torch.autograd.Function):
    """As `sum_over_processes` says."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        total = part.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * count_processes()
