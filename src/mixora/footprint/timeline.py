"""The stretches that a step consists of, and what it would take if those left out were run as well."""

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

Phase = Literal["forward", "backward"]


@dataclass
class Moment:
    """While a unit is computed: the most bytes alive besides weights.

    `live`: without gradients that are finished. `with_gradients`: with them.
    """

    live: int = 0
    with_gradients: int = 0


@dataclass(frozen=True)
class Course:
    """A step. `moments`: by phase and number of the unit. `kept`: bytes alive between forward and backward."""

    moments: dict[tuple[Phase, int], Moment]
    kept: int


@dataclass
class Stretch:
    """Of a step, while one unit is computed. `start`, `gradients`: bytes alive and of finished gradients as it begins.

    `kind`: what stretches that are alike have in common. `role`: a `model` is what each that is `left_out` would be.
    `made`: storages that a model made by serial number, as far as they were alive when the next block began.
    """

    phase: Phase
    unit: int
    start: int
    gradients: int
    kind: Hashable = None
    role: Literal["plain", "model", "left_out"] = "plain"
    live: int = 0
    with_gradients: int = 0
    made: dict[int, int] = field(default_factory=dict)


@dataclass
class Shift:
    """What stretches left out so far would have added: to the bytes alive, and to finished gradients."""

    live: int = 0
    gradients: int = 0


def compose(stretches: list[Stretch], alive: dict[int, int]) -> Course:
    """The step as it would be with everything run.

    `alive`: storages by serial number as forward ended. What a model made and gave back later in forward (records of
    routings, say), those left out would have given back too.
    """
    models = {(s.phase, s.kind): (s, grown, done) for s, grown, done in _changes(stretches) if s.role == "model"}
    moments: dict[tuple[Phase, int], Moment] = {}
    shift, given_back, kept = Shift(), 0, None
    for stretch, following in zip(stretches, [*stretches[1:], None], strict=True):
        if stretch.phase == "backward" and kept is None:
            shift.live -= given_back
            kept = stretch.start + shift.live
        as_if, grown, finished = models.get((stretch.phase, stretch.kind), (stretch, 0, 0))
        if stretch.role != "left_out" or following is None:
            as_if = stretch
        moment = moments.setdefault((stretch.phase, stretch.unit), Moment())
        start = stretch.start + shift.live
        live = start + as_if.live - as_if.start
        so_far = stretch.gradients + shift.gradients
        with_gradients = start + so_far + as_if.with_gradients - as_if.start - as_if.gradients
        moment.live, moment.with_gradients = max(moment.live, live), max(moment.with_gradients, with_gradients)
        if stretch.role == "left_out" and following is not None:
            shift.live += grown - (following.start - stretch.start)
            shift.gradients += finished - (following.gradients - stretch.gradients)
            given_back += sum(size for serial, size in as_if.made.items() if serial not in alive)
    assert kept is not None
    return Course(moments, kept)


def _changes(stretches: list[Stretch]) -> Iterator[tuple[Stretch, int, int]]:
    """By how much bytes alive and finished gradients change from the start of each block to that of the next one."""
    blocks = [s for s in stretches if s.unit]
    for stretch, following in pairwise(blocks):
        yield stretch, following.start - stretch.start, following.gradients - stretch.gradients
