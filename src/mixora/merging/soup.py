"""Greedy soup: an expert joins the mean only if the held-out loss falls (Wortsman et al. 2022, arXiv 2203.05482)."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import nn

from mixora.display.stages import Advance
from mixora.errors import ConfigError, DataError
from mixora.evaluate.inference import inference
from mixora.merging.approximation import Batch
from mixora.merging.comparison import predict, sum_loss
from mixora.mixture import Mixture
from mixora.routing.draws import serving


@dataclass(frozen=True)
class Soup:
    """The chosen experts, and held-out losses in nats (squared errors where labels are numbers).

    `loss`: of the mean of `members`. `loss_of_all`: of the mean of all experts. `losses`: of each expert alone.
    """

    members: tuple[int, ...]
    loss: float
    loss_of_all: float
    losses: tuple[float, ...]


def cook(
    model: nn.Module, modules: Sequence[Mixture], adapter: str, batches: Collection[Batch], advance: Advance
) -> Soup:
    """Start from the best expert and offer the others in the order of their own losses.

    Number e means expert e of every site. Raises `ConfigError` where sites differ in their number of experts or draw
    none, and `DataError` where nothing is supervised.
    """
    counts = {m.parts[adapter].router.num_experts for m in modules if m.parts[adapter].router.draws}
    if len(counts) != 1:
        raise ConfigError(
            f"soup: the sites of this adapter draw from {sorted(counts) or 'no'} experts; valid: one number of drawn "
            "experts at all sites, as in the recipe adamix"
        )
    experts, done = range(*counts), 0

    def measure(members: tuple[int, ...]) -> float:
        nonlocal done
        with serving(members=members):
            loss = _measure(model, batches)
        done += 1
        advance(done, 2 * len(experts))
        return loss

    losses = [measure((expert,)) for expert in experts]
    first, *others = sorted(experts, key=losses.__getitem__)
    members, best = [first], losses[first]
    for expert in others:
        tried = measure((*members, expert))
        if tried < best:
            members, best = [*members, expert], tried
    return Soup(tuple(sorted(members)), best, measure(tuple(experts)), tuple(losses))


def _measure(model: nn.Module, batches: Collection[Batch]) -> float:
    """The mean loss over all supervised predictions."""
    total, count = 0.0, 0
    with inference(model) as device:
        for batch in batches:
            logits_NV, labels_N = predict(model, {name: tensor.to(device) for name, tensor in batch.items()})
            total += float(sum_loss(logits_NV, labels_N))
            count += len(labels_N)
    if not count:
        raise DataError("soup: no token is supervised, so there is nothing to measure")
    return total / count
