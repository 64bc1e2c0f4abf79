"""A training step on the meta device: what is alive at each moment, counted and not computed.

Forward, loss and backward run as they would with weights, kernels, lean activations, recomputation and the fused loss
included; only the numbers are missing.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mixora.footprint.live import LiveBytes
from mixora.footprint.stand_ins import stand_ins
from mixora.footprint.units import Unit

Loss = Callable[[Any, dict[str, Tensor]], Tensor]
"""The loss of a model on a batch, with its graph."""
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


def run_step(model: nn.Module, units: Sequence[Unit], batch: dict[str, Tensor], compute_loss: Loss) -> Course:
    """Forward, loss and backward of `model`, which stands on the meta device and is adapted; leaves no gradients."""
    was_training = model.training
    model.train()
    with _Watch(model, units, batch) as watch, watch.listening():
        loss = compute_loss(model, batch)
        kept = watch.now
        watch.turn()
        loss.backward()
    model.train(was_training)
    return Course(watch.moments, kept)


class _Watch(LiveBytes):
    """Tells which unit is computed, and lets go of gradients as they are finished: strategies do different things."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], batch: dict[str, Tensor]) -> None:
        super().__init__([*model.parameters(), *model.buffers(), *batch.values()])
        self.model, self.units = model, units
        self.moments: dict[tuple[Phase, int], Moment] = {}
        self.phase: Phase = "forward"
        self.unit = self.gradients = 0

    def turn(self) -> None:
        """Backward begins, outside of the blocks."""
        self.phase, self.unit = "backward", 0

    def note(self) -> None:
        moment = self.moments.setdefault((self.phase, self.unit), Moment())
        moment.live = max(moment.live, self.now)
        moment.with_gradients = max(moment.with_gradients, self.now + self.gradients)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """With hooks on blocks and trained parameters."""
        handles = [p.register_post_accumulate_grad_hook(self._take) for p in self.model.parameters() if p.requires_grad]
        for number, unit in enumerate(self.units):
            if unit.module is not None:
                handles += self._follow(unit.module, number)
        try:
            with stand_ins():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _follow(self, block: nn.Module, number: int) -> list[RemovableHandle]:
        def enter(*_: Any) -> None:
            self.unit = number

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            if self.phase == "forward":
                self.unit = 0
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad:
                hidden.register_hook(enter)

        return [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

    def _take(self, parameter: Tensor) -> None:
        self.gradients += parameter.nbytes
        parameter.grad = None
        self.note()
