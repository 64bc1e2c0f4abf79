"""A training step on the meta device: what is alive at each moment, counted and not computed.

Forward, loss and backward run as they would with weights, kernels, lean activations, recomputation and the fused loss
included; only the numbers are missing, and of blocks that are alike all but a few.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from mixora.footprint.alike import Kinds, describe, describe_input, may_leave_out
from mixora.footprint.live import LiveBytes
from mixora.footprint.stand_ins import stand_ins
from mixora.footprint.timeline import Course, Phase, Stretch, compose
from mixora.footprint.units import Unit
from mixora.passes.activations import keep_all

Loss = Callable[[Any, dict[str, Tensor]], Tensor]
"""The loss of a model on a batch, with its graph."""


def run_step(
    model: nn.Module,
    units: Sequence[Unit],
    batch: dict[str, Tensor],
    compute_loss: Loss,
    *,
    whole: bool = False,
    lean: bool = True,
) -> Course:
    """Forward, loss and backward of `model`, which stands on the meta device and is adapted; leaves no gradients.

    `whole`: run every block, also those like others. `lean`: what can be made again in backward is not kept.
    """
    was_training = model.training
    model.train()
    leaves_out = not whole and may_leave_out(model)
    with _Watch(model, units, batch, leaves_out) as watch, watch.listening(), nullcontext() if lean else keep_all():
        loss = compute_loss(model, batch)
        # else the routings in there would live on
        watch.kinds.seen.clear()
        alive = watch.since(0)
        watch.enter("backward", 0)
        loss.backward()
    model.train(was_training)
    return compose(watch.stretches, alive)


class _Watch(LiveBytes):
    """Tells which unit is computed, and lets go of gradients as they are finished: strategies do different things."""

    def __init__(self, model: nn.Module, units: Sequence[Unit], batch: dict[str, Tensor], leaves_out: bool) -> None:
        super().__init__([*model.parameters(), *model.buffers(), *batch.values()])
        self.model, self.units = model, units
        self.gradients = 0
        self.stretches = [Stretch("forward", 0, 0, 0)]
        self.kinds, self.calls = Kinds(), Counter[int]()
        self.forms = [None if u.module is None else describe(u.module) for u in units] if leaves_out else None
        self.last = set({form: number for number, form in enumerate(self.forms or [])}.values())
        self.settling: Stretch | None = None
        self.first_made = 0

    def enter(self, phase: Phase, unit: int, kind: Hashable = None, role: Any = "plain") -> None:
        """Another unit is computed from now on."""
        if unit and phase == "forward":
            alive = self.since(0)
            if self.settling is not None:
                self.settling.made = {serial: size for serial, size in self.settling.made.items() if serial in alive}
            last = next((s for s in reversed(self.stretches) if s.unit), None)
            self.settling = last if last is not None and last.role == "model" else None
            if self.settling is not None:
                self.settling.made = self.since(self.first_made)
        self.stretches.append(Stretch(phase, unit, self.now, self.gradients, kind, role, self.now))
        self.stretches[-1].with_gradients = self.now + self.gradients
        if phase == "forward" and role == "model":
            self.first_made = self.made

    def note(self) -> None:
        stretch = self.stretches[-1]
        stretch.live = max(stretch.live, self.now)
        stretch.with_gradients = max(stretch.with_gradients, self.now + self.gradients)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """With hooks on trained parameters, and something around each block."""
        with ExitStack() as stack:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.register_post_accumulate_grad_hook(self._take).remove)
            for number, unit in enumerate(self.units):
                if unit.module is not None:
                    stack.enter_context(self._around(unit.module, number))
            stack.enter_context(stand_ins())
            yield

    @contextmanager
    def _around(self, block: Any, number: int) -> Iterator[None]:
        own, replaced = block.forward, vars(block).get("forward")
        block.forward = partial(self._run, block, number, own)
        try:
            yield
        finally:
            del block.forward
            if replaced is not None:
                block.forward = replaced

    def _run(self, block: nn.Module, number: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        phase = self.stretches[-1].phase
        self.calls[number] += 1
        kind: Hashable = None
        is_left_out = False
        if self.forms is not None and phase == "forward":
            kind = (self.forms[number], self.calls[number], describe_input(args, kwargs))
            # the first one of a kind that backward comes to makes what the others find
            is_left_out = number not in self.last and self.kinds.can_stand_in(kind, args)
        role = "left_out" if is_left_out else "model" if self.kinds.count[kind] == 1 else "plain"
        self.enter(phase, number, kind, role)
        if is_left_out:
            output = self.kinds.stand_in(kind, block, args)
        else:
            output = self.kinds.run(kind, block, own, args, kwargs)
        if phase == "forward":
            self.enter("forward", 0)
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, Tensor) and hidden.requires_grad:
            hidden.register_hook(lambda _: self.enter("backward", number, kind, role))
        return output

    def _take(self, parameter: Tensor) -> None:
        self.gradients += parameter.nbytes
        parameter.grad = None
        self.note()
