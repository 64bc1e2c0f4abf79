"""Routes that are drawn once for a whole forward pass, and what serves a pass where none is drawn (AdaMix).

One number is drawn at a model's entrance, before the first layer, from the ambient generator: a resumed run draws it
again, data-parallel ranks get that of the first rank, and a layer that activation checkpointing runs once more finds
it in its pass. Every site derives its own route from it.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import torch.distributed as dist

from mixora.host.world import count_processes


@dataclass(frozen=True)
class Draw:
    """What serves one site in one pass.

    `key`: an expert is drawn by it, the same one for the same key. Without it, the mean of `members` serves, of all
    experts where that is None.
    """

    key: str | None = None
    members: tuple[int, ...] | None = None

    def choose(self, what: str, count: int) -> int | None:
        """The drawn one of `count` experts, uniform and independent for each name `what`; None without a key."""
        if self.key is None:
            return None
        digest = hashlib.blake2b(f"{self.key}/{what}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) % count


MEAN = Draw()


@dataclass(frozen=True)
class Serving:
    """How models in evaluation mode are served: by drawn routes, or by the mean of `members` (None: all experts)."""

    draws: bool = False
    members: tuple[int, ...] | None = None


MERGED = Serving()
_serving = ContextVar("serving", default=MERGED)


def current_serving() -> Serving:
    """What is in force."""
    return _serving.get()


@contextmanager
def serving(draws: bool = False, members: tuple[int, ...] | None = None) -> Iterator[None]:
    """Serve models in evaluation mode so while open; models in training mode always draw."""
    outer = _serving.set(Serving(draws, members))
    try:
        yield
    finally:
        _serving.reset(outer)


def draw_seed(shared: bool) -> int:
    """A number from the ambient generator of the CPU; with `shared`, the first data-parallel rank's."""
    seed = torch.randint(2**62, ())
    if shared and count_processes() > 1:
        has_cpu = "cpu:" in dist.get_backend_config()
        seed = seed if has_cpu else seed.cuda()
        dist.broadcast(seed, src=0)
    return int(seed)
