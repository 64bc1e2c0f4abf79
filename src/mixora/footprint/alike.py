"""Blocks that are alike: some of each kind are run, for the others something stands in that passes the input on.

That saves time and no accuracy: the operators of alike blocks are the same, and take the same bytes.
"""

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mixora.mixture import Mixture, mixtures_of
from mixora.passes import Pass, current
from mixora.routing import Observation, Routing

RUN = 3
"""Blocks of a kind that are run in a pass: the second one, with one before and one after it, is the model of others."""
_PLACES = {"layer_idx", "path"}


@dataclass(frozen=True)
class Seen:
    """What a block gave: whether that has the form of its input, and which routings it recorded, by its mixtures."""

    keeps_form: bool
    routings: list[tuple[int, Observation]]


def describe(block: nn.Module) -> Hashable:
    """What makes blocks alike: modules, their settings and the shapes of their parameters; not their numbers."""
    return repr([(name, type(module), _settings_of(module)) for name, module in block.named_modules()])


def _settings_of(module: nn.Module) -> list[Any]:
    plain = {k: v for k, v in vars(module).items() if isinstance(v, (bool, int, float, str)) and k not in _PLACES}
    own = [(n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters(recurse=False)]
    parts = list(module.parts.items()) if isinstance(module, Mixture) else []
    return [
        plain,
        own,
        [(a, p.expert.config, p.router.config, type(p.kernel), p.shape, p.stream, len(p.leader)) for a, p in parts],
    ]


def describe_input(args: Any, kwargs: Any) -> Hashable:
    """The form of what a block is called with."""
    leaves = tree_leaves((args, kwargs))
    form = [(x.shape, x.dtype, x.requires_grad) if isinstance(x, Tensor) else type(x) for x in leaves]
    return repr((form, sorted(kwargs)))


def may_leave_out(model: nn.Module) -> bool:
    """Not where a pass is run again as a whole: what is saved must be the same then."""
    parts = [part for layer in mixtures_of(model) for part in layer.parts.values()]
    return not any(loss.recomputes for part in parts for _, loss, _ in part.pass_losses)


class Kinds:
    """What was seen of each kind of block so far."""

    def __init__(self) -> None:
        self.count: Counter[Hashable] = Counter()
        self.seen: dict[Hashable, Seen] = {}

    def can_stand_in(self, kind: Hashable, args: Any) -> bool:
        """Whether enough blocks of that kind were run, and all that they do is known."""
        here = current()
        return (
            self.count[kind] >= RUN
            and kind in self.seen
            and self.seen[kind].keeps_form
            and here is not None
            and here.owns_losses
            and args[0].requires_grad
        )

    def run(self, kind: Hashable, block: nn.Module, own: Any, args: Any, kwargs: Any) -> Any:
        """The block itself; what it did is kept."""
        self.count[kind] += 1
        recorded = _recorded_in(current())
        before = len(recorded)
        output = own(*args, **kwargs)
        if self.count[kind] == 2:
            numbers = {layer.path: number for number, layer in enumerate(mixtures_of(block))}
            routings = [(numbers.get(o.path, -1), o) for o in recorded[before:]]
            is_alone = isinstance(output, Tensor) and bool(args) and isinstance(args[0], Tensor)
            keeps_form = is_alone and (output.shape, output.dtype) == (args[0].shape, args[0].dtype)
            self.seen[kind] = Seen(keeps_form and all(number >= 0 for number, _ in routings), routings)
        return output

    def stand_in(self, kind: Hashable, block: nn.Module, args: Any) -> Tensor:
        """Hands the input on, and records routings like those that the block would have made."""
        here = current()
        assert here is not None
        self.count[kind] += 1
        observations = [o for _, o in self.seen[kind].routings]
        made = list({id(t): t for o in observations for t in _with_graph(o.routing).values()}.values())
        output, *copies = _HandOn.apply(args[0], *(t.detach() for t in made))
        copy_of = {id(t): copy for t, copy in zip(made, copies, strict=True)}
        paths = [layer.path for layer in mixtures_of(block)]
        for number, seen in self.seen[kind].routings:
            changes = {name: copy_of[id(t)] for name, t in _with_graph(seen.routing).items()}
            here.record(paths[number], seen.adapter, replace(seen.routing, **changes))
        return output


def _recorded_in(here: Pass | None) -> list[Observation]:
    return [] if here is None or here.trace is None else here.trace.observations


def _with_graph(routing: Routing) -> dict[str, Tensor]:
    found = {field.name: getattr(routing, field.name) for field in fields(routing)}
    return {name: t for name, t in found.items() if isinstance(t, Tensor) and t.requires_grad}


class _HandOn(torch.autograd.Function):
    """The identity. Gradients of what follows the first tensor wait for that of the first, as they do in a block."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return gradients[0], *(None for _ in gradients[1:])
