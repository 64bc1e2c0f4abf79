"""By what a tensor is known again that was read before: itself, unchanged, or another one at its place in memory."""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class Input(NamedTuple):
    """A tensor that something was made from, as it was then: `version` counts changes in place.

    `storage` and `view`: where it stands in memory, where other tensors that stand there are taken for it too.
    """

    tensor: weakref.ref[Tensor]
    version: int
    storage: StorageWeakRef | None = None
    view: tuple[Any, ...] | None = None

    @classmethod
    def of(cls, x: Tensor, wrapped: bool = False) -> "Input":
        """`x` as it is now; with `wrapped`, also behind the identities that ZeRO-3 puts before each module."""
        if wrapped and not torch.compiler.is_compiling():
            return cls(weakref.ref(x), version_of(x), StorageWeakRef(x.untyped_storage()), _view_of(x))
        return cls(weakref.ref(x), version_of(x))

    def is_now(self, x: Tensor) -> bool:
        """Whether it is `x`, and that has not changed since."""
        return (self.tensor() is x or self._stands_at(x)) and self.version == version_of(x)

    def _stands_at(self, x: Tensor) -> bool:
        # what was detached is none: gradients would go where they are not wanted
        return (
            self.storage is not None
            and self.view == _view_of(x)
            and not self.storage.expired()
            and self.storage == StorageWeakRef(x.untyped_storage())
        )


def _view_of(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.storage_offset(), x.dtype, x.requires_grad


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; tensors of inference mode do not count that."""
    return 0 if tensor.is_inference() else tensor._version
