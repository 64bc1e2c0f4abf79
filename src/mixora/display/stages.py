"""How long steps tell of their progress: what is being done, then from time to time (done, total)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

Advance = Callable[[int, int], None]
Stage = Callable[[str], AbstractContextManager[Advance]]
"""Told what is being done, gives a context with a function of (done, total). Without a call, the length is unknown."""

T = TypeVar("T")


def silently(label: str) -> AbstractContextManager[Advance]:
    """A stage that nobody watches."""
    return nullcontext(lambda done, total: None)


def count(items: Sequence[T], advance: Advance) -> Iterator[T]:
    """The items, each counted once it is done with."""
    for done, item in enumerate(items, 1):
        yield item
        advance(done, len(items))
