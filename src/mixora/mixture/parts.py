"""What serves one adapter at one module: its expert, router and kernel at work, and the losses it feels."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mixora.contracts import Expert, Kernel, Parameters, PassLoss, Router, Shape, SiteLoss, SpanningExpert
from mixora.passes import Stream
from mixora.routing import Routing
from mixora.routing.draws import Draw

Sums = dict[str, tuple[Tensor, ...]]


@dataclass
class Parts:
    """What serves one adapter at one module; its tensors live in the module.

    `shape`: that of the experts whose tensors compute a pass. `losses`: name, loss and the weight of this site in the
    model's total (coefficient / number of routed sites). `pass_losses`: name, loss and coefficient, at every site.
    `leader`: the module whose router is used, where linears that read the same input share one; empty otherwise.
    `kin`: the modules under the same rule that read the same input, this one among them.
    `firsts`: paths of the first linears of a feed-forward part, where the experts go through all of it.
    """

    expert: Expert
    router: Router
    kernel: Kernel
    shape: Shape
    stream: Stream = "source"
    losses: list[tuple[str, SiteLoss, float]] = field(default_factory=list)
    pass_losses: list[tuple[str, PassLoss, float]] = field(default_factory=list)
    leader: list[Any] = field(default_factory=list)
    kin: list[Any] = field(default_factory=list)
    firsts: frozenset[str] = frozenset()

    def delta(self, read_TI: Tensor, parameters: Parameters, routing: Routing, draw: Draw, training: bool) -> Tensor:
        """What the experts add, scale included: [T, O]. `parameters` are all of the site."""
        kernel = self.kernel
        if self.router.draws:
            parameters, routing = self.router.serve(parameters, draw), Routing.even(routing.valid_T, (0,), 1)
            kernel = type(kernel)((len(parameters["A"]),))
        return self.expert.delta(read_TI, parameters, self._scale(routing), kernel, training)

    def enter(self, x_TI: Tensor, parameters: Parameters, routing: Routing, training: bool) -> Tensor:
        """What the experts that go through a feed-forward part add to each slot in its first linears: [K T, O]."""
        assert isinstance(self.expert, SpanningExpert)
        return self.expert.enter(x_TI, parameters, self._scale(routing.unweighted()), self.kernel, training)

    def leave(self, x_SI: Tensor, parameters: Parameters, routing: Routing, training: bool) -> Tensor:
        """What they add in its last linear, weighted, for the slots `x_SI` [K T, I]: [T, O]."""
        assert isinstance(self.expert, SpanningExpert)
        return self.expert.leave(x_SI, parameters, self._scale(routing), self.kernel, training)

    def _scale(self, routing: Routing) -> Routing:
        """The scale on the weights: a [T, O] less to be made than on what the experts give."""
        return replace(routing, weights_TK=routing.weights_TK * self.expert.scale(self.shape))

    def add_up(self, routing: Routing) -> Sums:
        """What each of the losses needs to know of this site's tokens, by name."""
        sums = {name: loss.add_up(routing) for name, loss, _ in self.losses}
        return {name: of_loss for name, of_loss in sums.items() if of_loss is not None}

    def conclude(self, sums: Sums) -> tuple[Tensor | None, dict[str, Tensor]]:
        """This site's share of the auxiliary loss, and each term for the log (detached, without its coefficient)."""
        total, terms = None, {}
        for name, loss, weight in self.losses:
            if name in sums:
                value = loss.conclude(*sums[name])
                total = value * weight if total is None else total + value * weight
                terms[name] = value.detach()
        return total, terms
