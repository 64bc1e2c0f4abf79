"""Bytes that are alive at once while operators run."""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While on, counts the storages that operators make: `now`, all that are alive.

    `known`: tensors whose storages do not count. `made`: how many were made so far. `note` is called after each
    operator.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.made = 0
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, int] = {}
        self.serials: dict[int, int] = {}

    def note(self) -> None:
        """Take note of `now`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            name = storage._cdata
            if name not in self.alive and name not in self.known:
                self.alive[name] = storage.nbytes()
                self.serials[name] = self.made = self.made + 1
                self.now += storage.nbytes()
                # a storage's address is used again when it is gone
                weakref.finalize(storage, self._free, name)
        self.note()
        return result

    def since(self, serial: int) -> dict[int, int]:
        """The bytes of storages that are alive and were made after that one, by serial number."""
        return {self.serials[name]: size for name, size in self.alive.items() if self.serials[name] > serial}

    def _free(self, name: int) -> None:
        self.now -= self.alive.pop(name, 0)
        self.serials.pop(name, None)


def _tensors(result: Any) -> Iterator[Tensor]:
    leaves = [result] if isinstance(result, Tensor) else tree_leaves(result)
    return (leaf for leaf in leaves if isinstance(leaf, Tensor))
