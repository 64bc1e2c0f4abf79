"""Auxiliary terms between two log lines."""

from collections import defaultdict

import torch
from torch import Tensor


class Terms:
    """Means of the auxiliary terms since they were last read."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, terms: dict[str, Tensor]) -> None:
        """One micro-batch's terms."""
        for name, value in terms.items():
            self._seen[name].append(value)

    def take(self) -> dict[str, float]:
        """The means, for a log; starts anew."""
        means = {name: torch.stack(values).float().mean().item() for name, values in self._seen.items()}
        self._seen.clear()
        return means

    def state(self) -> dict[str, list[Tensor]]:
        """What a checkpoint keeps."""
        return dict(self._seen)

    def restore(self, state: dict[str, list[Tensor]]) -> None:
        """Go on from there."""
        self._seen = defaultdict(list, state)
