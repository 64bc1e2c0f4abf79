"""The memory and the traffic of a training step under each strategy, from a few counted steps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixora.footprint.communication import Traffic
from mixora.footprint.step import Loss, run_step
from mixora.footprint.strategies import Single, Strategy
from mixora.footprint.timeline import Course
from mixora.footprint.units import split_into_units


@dataclass(frozen=True)
class Memory:
    """Bytes on one process. `activations`: kept from forward to backward.

    `peak`: the most that is alive at once in forward, backward and the optimiser's step. The other parts are those it
    consists of but for what single operators and gathered weights take; they need not be alive at once.
    `peak_with_logits`: where the loss is not fused with the head.
    """

    base_weights: int
    adapter_weights: int
    gradients: int
    optimiser: int
    buffers: int
    activations: int
    peak: int
    peak_with_logits: int | None


@dataclass(frozen=True)
class Footprint:
    """What a step takes on each of `processes` under `strategy`."""

    strategy: str
    processes: int
    memory: Memory
    traffic: Traffic


def estimate(
    model: nn.Module,
    batch: int,
    length: int,
    losses: Mapping[bool, Loss],
    strategies: Sequence[type[Strategy]] = (Single,),
    processes: int = 1,
) -> list[Footprint]:
    """The footprint of a step on `batch` rows of `length` tokens for each process, by strategy.

    `model`: an adapted model on the meta device. `losses`: what computes its loss, by whether the loss is fused with
    the head where it can be. Strategies that shard the head need the one that is not; the others do with either.
    """
    units = split_into_units(model)
    hidden_size = getattr(getattr(model, "config", None), "hidden_size", 0)
    inputs = _make_batch(model, batch, length)
    wanted = {(kind.has_lean_activations, is_fused) for kind in strategies for is_fused in _losses_of(kind, losses)}
    courses = {
        (is_lean, is_fused): run_step(model, units, inputs, losses[is_fused], lean=is_lean)
        for is_lean, is_fused in sorted(wanted)
    }
    found = []
    for kind in strategies:
        strategy = kind(processes, units, hidden_size)
        of_kind = {fused: courses[kind.has_lean_activations, fused] for fused in _losses_of(kind, losses)}
        found.append(Footprint(strategy.name, processes, _add_up(strategy, of_kind), strategy.send()))
    return found


def _losses_of(kind: type[Strategy], losses: Mapping[bool, Loss]) -> list[bool]:
    """Which of the losses a strategy can have, those that are not fused always."""
    return [is_fused for is_fused in losses if kind.fuses_loss or not is_fused] or list(losses)


def _add_up(strategy: Strategy, courses: Mapping[bool, Course]) -> Memory:
    held = strategy.hold()
    stays = held.base_weights + held.adapter_weights + held.optimiser + held.buffers
    peaks = {}
    for is_fused, course in courses.items():
        moments = [strategy.spend(phase, unit, moment) for (phase, unit), moment in course.moments.items()]
        peaks[is_fused] = stays + max(*moments, held.gradients)
    taken = courses.get(strategy.fuses_loss) or courses[not strategy.fuses_loss]
    peak = peaks.get(strategy.fuses_loss) or peaks[not strategy.fuses_loss]
    return Memory(**vars(held), activations=taken.kept, peak=peak, peak_with_logits=peaks.get(False))


def _make_batch(model: Any, batch: int, length: int) -> dict[str, Tensor]:
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    return {"input_ids": ids, "labels": ids[:, 0] if _classifies(model) else ids}


def _classifies(model: Any) -> bool:
    return "SequenceClassification" in type(getattr(model, "get_base_model", lambda: model)()).__name__
