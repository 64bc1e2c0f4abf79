"""What an expert, a router, a kernel, a loss and an allocator must offer.

A new part = one file with one of these + one table line.

Parts keep no tensors: the site they serve does, so that PEFT can move, save and switch them like any other adapter's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from mixora.config import Strict
from mixora.routing import Routing, Tokens
from mixora.routing.draws import Draw

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """The size of one site: widths of the adapted module and the ranks of its experts (R is their sum)."""

    in_features: int
    out_features: int
    ranks: tuple[int, ...]


class Kernel(ABC):
    """Computes the experts of one site; `ranks` are the experts' ranks, R their sum.

    Slots, what passes from `expand` to `contract`, belong to the kernel. Between the two verbs stand only pointwise
    maps, which `map` applies. Every kernel gives the values and gradients of `kernels.Loop`. `joins`: it can compute
    the frozen linear and the router as well, for experts and routers that `join`.
    """

    joins: ClassVar[bool] = False

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    @classmethod
    def objection(cls, shape: Shape, dtype: torch.dtype) -> str | None:
        """Why this kernel cannot compute such a site in `dtype`; None where it can."""
        return None

    @abstractmethod
    def expand(self, x_TI: Tensor, w_RI: Tensor, routing: Routing, bias_R: Tensor | None = None) -> Any:
        """Slots that hold W_e x_t (+ b_e) for at least the chosen experts e of each token t; in the dtype of `x_TI`."""

    @abstractmethod
    def share(self, hidden_Tr: Tensor, routing: Routing) -> Any:
        """Slots in which each chosen expert of token t holds the same numbers, row t; all experts have rank r."""

    @abstractmethod
    def map(self, function: Callable[[Tensor], Tensor], slots: Any) -> Any:
        """The slots with `function` applied to each number."""

    @abstractmethod
    def by_slot(self, slots: Any, routing: Routing) -> Any:
        """The slots of T tokens as those of K T tokens with one expert each, as `Routing.by_slot` orders them."""

    @abstractmethod
    def by_token(self, slots: Any, routing: Routing) -> Any:
        """The inverse of `by_slot`: what K T tokens hold, each for its one expert, as the slots of T tokens."""

    @abstractmethod
    def contract(self, slots: Any, w_RO: Tensor, routing: Routing) -> Tensor:
        """sum_e weight_te W_e^T slot_te: [T, O], in the dtype of the slots."""


class Expert(ABC):
    """A family of experts that all read the same tensor, x.

    `reads`: whether x is the frozen module's `input` (experts stand beside a linear module) or its `output` (they
    stand behind a module of any kind, in series). Routers read the input in both cases. `spans_ffn`: an expert goes
    through all linears of a feed-forward part, with the model's own non-linearity inside and one router for all.
    `joins`: an expert is B_e A_e x, with A and B among its parameters and `dropout` in its configuration. `one_rank`:
    the experts of a site cannot differ in rank. `Config`: the model of its settings.
    """

    Config: ClassVar[type[Strict]]
    reads: ClassVar[Literal["input", "output"]] = "input"
    one_rank: ClassVar[bool] = False
    spans_ffn: ClassVar[bool] = False
    joins: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def parameter_shapes(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Name and shape of each trainable tensor of a site."""

    @abstractmethod
    def initialise(self, parameters: Parameters, shape: Shape) -> None:
        """Fill new parameters in place, so that the adapted module starts as the method prescribes."""

    @abstractmethod
    def delta(self, x_TI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """What the chosen experts add to the output of the frozen module: [T, O], dtype of `x_TI`.

        Linear in the weights of `routing`, which hold the scale already. With `reads = "output"`, x is [T, O].
        """

    @abstractmethod
    def scale(self, shape: Shape) -> float:
        """The factor s in front of the sum over experts."""


class SpanningExpert(Expert):
    """An expert that goes through a feed-forward part: its first linears give K T slots, of which the last gives T."""

    @abstractmethod
    def enter(self, x_TI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """What each slot has of its own behind a first linear, in the order of `Routing.by_slot`: [K T, O]."""

    @abstractmethod
    def leave(self, x_SI: Tensor, parameters: Parameters, routing: Routing, kernel: Kernel, training: bool) -> Tensor:
        """The weighted sum of what the slots [K T, I] have of their own behind the last linear: [T, O]."""


class Router(ABC):
    """Chooses experts for each token. Random draws come from the ambient generator: recomputation repeats them.

    A router that `joins` decides by products of x with rows of its own, or without looking at x. One that `draws`
    chooses one expert for all tokens of a pass, by the draw in `Tokens`; its experts' tensors stand apart, so that an
    optimiser leaves those alone that no pass of its step has used. One that `is_static` gives the same weights for
    every input in evaluation, so its experts can be merged. `Config`: the model of its settings.
    """

    Config: ClassVar[type[Strict]]
    is_static: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    joins: ClassVar[bool] = False

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """E, the number of experts of a site."""

    @property
    @abstractmethod
    def top_k(self) -> int:
        """K, the most experts a token is computed by."""

    @abstractmethod
    def parameter_shapes(self, in_features: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each trainable tensor; names begin with `router`."""

    @abstractmethod
    def initialise(self, parameters: Parameters) -> None:
        """Fill new parameters in place."""

    @abstractmethod
    def route(self, x_TI: Tensor, parameters: Parameters, tokens: Tokens, training: bool) -> Routing:
        """The routing of T tokens, decided in fp32 (fp64 for fp64 inputs) whatever `x_TI` is, also under autocast."""

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token always sum to 1, or are all 0: then experts may hold the frozen module."""
        return False

    def objection(self, is_causal: bool, expert: "Expert") -> str | None:
        """Why this router cannot serve such a model or such experts; None where it can."""
        return None

    def alternatives(self, kinds: Iterable[str]) -> list[dict[str, str]]:
        """By which names the tensors of a site are kept, per kind: one entry for each expert that a pass may draw."""
        return [{kind: kind for kind in kinds}]

    @property
    def starts_alike(self) -> bool:
        """Whether all `alternatives` begin with the numbers of the first."""
        return False

    def at_once(self, shape: Shape) -> Shape:
        """The experts of a site that its tensors, as `serve` gives them, hold."""
        return replace(shape, ranks=shape.ranks[:1]) if self.draws else shape

    def serve(self, parameters: Parameters, draw: Draw) -> Parameters:
        """The experts' tensors that compute a pass, by kind, out of the kept ones; those of one expert if `draws`."""
        return parameters


def kept_shapes(expert: Expert, router: Router, shape: Shape) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a site's experts."""
    shapes = expert.parameter_shapes(router.at_once(shape))
    return {name: shapes[kind] for names in router.alternatives(shapes) for kind, name in names.items()}


def fill_experts(expert: Expert, router: Router, shape: Shape, tensors: Parameters) -> None:
    """Initialise the new tensors of a site's experts, by their names, in place."""
    first, *others = router.alternatives(expert.parameter_shapes(shape))
    expert.initialise({kind: tensors[name] for kind, name in first.items()}, shape)
    for names in others:
        if router.starts_alike:
            for kind, name in names.items():
                tensors[name].data.copy_(tensors[first[kind]].data)
        else:
            expert.initialise({kind: tensors[name] for kind, name in names.items()}, shape)


class Loss(ABC):
    """An auxiliary loss. `Config`: the model of its settings, its coefficient among them."""

    Config: ClassVar[type[Strict]]

    def __init__(self, config: Any) -> None:
        self.config = config


class PassLoss(Loss):
    """Compares the outputs of two forward passes over the same batch, whose routes differ."""

    @property
    def recomputes(self) -> bool:
        """Whether the first pass keeps no activations and is run again in backward, when the second one's are gone."""
        return False

    @abstractmethod
    def of_items(self, first_NC: Tensor, second_NC: Tensor, is_regression: bool) -> Tensor:
        """The loss of each of N items (examples, or supervised tokens) with C outputs: fp32 [N], no coefficient."""


class SiteLoss(Loss):
    """A loss on what the router of a site decided: a function of sums over its tokens.

    So the sums of several processes, added up, give the loss of all their tokens.
    """

    @abstractmethod
    def add_up(self, routing: Routing) -> tuple[Tensor, ...] | None:
        """The sums over the real tokens, fp32 with their graph; None for routers without logits."""

    @abstractmethod
    def conclude(self, *sums: Tensor) -> Tensor:
        """The loss that these sums give, an fp32 scalar without its coefficient."""

    def of_site(self, routing: Routing) -> Tensor | None:
        """The loss of one site's routing; None for routers without logits."""
        sums = self.add_up(routing)
        return None if sums is None else self.conclude(*sums)


@dataclass(frozen=True)
class Candidate:
    """A site whose ranks are to be chosen: `module` is the frozen one, `ranks` are those that the rule gives."""

    path: str
    module: nn.Module
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Evidence:
    """What an allocator may look at. `progress` is told (done, total)."""

    model: nn.Module
    batches: Iterable[Mapping[str, Tensor]] | None
    progress: Callable[[int, int], None]


class Allocator(ABC):
    """Says which sites deserve how much of a budget; `mixora.planning.allocation` turns that into experts and ranks.

    `expert_power`: exponent of a site's weight by which its number of experts follows; 0 leaves the rules' numbers.
    `Config`: the model of its settings.
    """

    Config: ClassVar[type[Strict]]
    expert_power: float = 0.0

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def weigh(self, candidates: Sequence[Candidate], evidence: Evidence) -> list[float]:
        """A positive number for each site, to which the sum of its experts' ranks shall be proportional."""
