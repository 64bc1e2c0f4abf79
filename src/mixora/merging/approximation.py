"""The nearest single LoRA of a routed mixture, on data: one pass over the batches for each group of sites."""

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mixora import passes
from mixora.display.stages import Advance
from mixora.errors import ConfigError, DataError
from mixora.evaluate.inference import inference
from mixora.merging.regression import Inputs, Outputs
from mixora.mixture import Mixture
from mixora.mixture.low_rank import LowRank

Batch = Mapping[str, Tensor]
FLOAT64 = 8


@dataclass(frozen=True)
class Approximation:
    """What the nearest LoRA is fitted and measured on.

    `fit` and `held_out`: batches that the model's forward takes, with labels in the latter, which must be other rows.
    `fit` is gone through once for each group of sites, and is a list or a `DataLoader`.
    `origin`: what the model card calls the data. `memory`: bytes that the sums of one group of sites may take; a
    site whose sums are larger makes a group of its own.
    """

    fit: Collection[Batch]
    held_out: Collection[Batch]
    origin: str = "batches of the caller"
    memory: int = 2 * 2**30

    def __post_init__(self) -> None:
        for name in ("fit", "held_out"):
            batches = getattr(self, name)
            if not hasattr(batches, "__len__"):
                kind = type(batches).__name__
                raise DataError(f"{name}: got a {kind}, which can be gone through once; valid: a list or a DataLoader")
            if not len(batches):
                raise DataError(f"{name}: has no batches; valid: one or more")


def active_rank(modules: Sequence[Mixture], adapter: str) -> int:
    """The largest sum of ranks that the experts of one token can have at any of the sites."""
    parts = [module.parts[adapter] for module in modules]
    return max(sum(sorted(p.shape.ranks, reverse=True)[: p.router.top_k]) for p in parts)


def approximate(
    model: nn.Module,
    modules: Sequence[Mixture],
    adapter: str,
    material: Approximation,
    rank: int,
    advance: Advance,
) -> dict[str, tuple[LowRank, float]]:
    """For each site, by path: the best pair of `rank` (or of what the experts can fill) and the relative residual.

    Runs in evaluation mode over the real tokens of `material.fit`, padding left out. `advance` is told
    (batches done, batches in all).
    """
    groups = _group(_readers(model, modules, next(iter(material.fit))), adapter, material.memory)
    found: dict[str, tuple[LowRank, float]] = {}
    total = len(groups) * len(material.fit)
    for number, group in enumerate(groups):
        sums = _Sums(group, adapter)
        with inference(model) as device, sums.collecting():
            for done, batch in enumerate(material.fit, start=1 + number * len(material.fit)):
                # under a trace a module keeps its routing, which the sums are to be made with
                with passes.tracing():
                    model(**{name: tensor.to(device) for name, tensor in batch.items()})
                advance(done, total)
        found |= sums.solve(rank)
    return found


@contextmanager
def hooked(modules: Sequence[Mixture], hook: Callable[[Mixture, tuple[Any, ...], Tensor], Any]) -> Iterator[None]:
    """Let `hook` see every call of the modules; what it returns, if anything, replaces their output."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _readers(model: nn.Module, modules: Sequence[Mixture], batch: Batch) -> list[list[Mixture]]:
    """The modules in groups that read one tensor, as one batch shows."""
    seen: list[tuple[weakref.ref[Tensor], list[Mixture]]] = []

    def look(module: Mixture, args: tuple[Any, ...], output: Tensor) -> None:
        if any(module in readers for _, readers in seen):
            return
        for input_of, readers in seen:
            if input_of() is args[0]:
                readers.append(module)
                return
        seen.append((weakref.ref(args[0]), [module]))

    with inference(model) as device, hooked(modules, look):
        model(**{name: tensor.to(device) for name, tensor in batch.items()})
    found = [readers for _, readers in seen]
    silent = [module.path for module in modules if not any(module in readers for readers in found)]
    if silent:
        raise ConfigError(f"{silent[0]}: is not run by a forward of this model, so nothing can be fitted there")
    return found


def _group(readers: list[list[Mixture]], adapter: str, memory: int) -> list[list[list[Mixture]]]:
    """Consecutive readers whose sums take at most `memory` bytes together, one reader at least."""
    groups: list[list[list[Mixture]]] = []
    free = 0
    for one in readers:
        size = FLOAT64 * sum(_numbers(module, adapter) for module in one)
        size += FLOAT64 * one[0].parts[adapter].shape.in_features ** 2
        if not groups or size > free:
            groups.append([])
            free = memory
        groups[-1].append(one)
        free -= size
    return groups


def _numbers(module: Mixture, adapter: str) -> int:
    shape = module.parts[adapter].shape
    width = min(sum(shape.ranks), shape.out_features)
    return width * (shape.in_features + shape.out_features)


class _Sums:
    """The sums of one group of sites."""

    def __init__(self, group: list[list[Mixture]], adapter: str) -> None:
        self.adapter = adapter
        self.modules = [module for readers in group for module in readers]
        self.inputs: dict[str, Inputs] = {}
        self.outputs: dict[str, Outputs] = {}
        for readers in group:
            width = readers[0].parts[adapter].shape.in_features
            tensors = [module.parameters_of(adapter)["B"].detach() for module in readers]
            gram_II = tensors[0].new_zeros(width, width, dtype=torch.float64)
            # the first of the sites that read one tensor counts it
            self.inputs[readers[0].path] = Inputs(gram_II, [module.path for module in readers])
            for module, b_RO in zip(readers, tensors, strict=True):
                self.outputs[module.path] = Outputs.of(b_RO, width)

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add what every forward pass inside shows."""
        with hooked(self.modules, self._add):
            yield

    def _add(self, module: Mixture, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0]
        # finds the routing that the module itself has just used
        delta_TO, routing = module.delta(self.adapter, x, x, passes.current() or passes.Pass())
        x_TI = x.reshape(-1, x.shape[-1])[routing.valid_T].double()
        if module.path in self.inputs:
            self.inputs[module.path].add(x_TI)
        self.outputs[module.path].add(delta_TO[routing.valid_T].double(), x_TI)

    def solve(self, rank: int) -> dict[str, tuple[LowRank, float]]:
        """The pairs, in the dtype of the experts."""
        module_of = {module.path: module for module in self.modules}
        found = {}
        for inputs in self.inputs.values():
            white_Ik = inputs.whiten()
            for path in inputs.sites:
                b_RO = module_of[path].parameters_of(self.adapter)["B"]
                useful = min(rank, *b_RO.shape, len(white_Ik))
                pair, error = self.outputs[path].fit(white_Ik, useful)
                found[path] = (LowRank(pair.A_rI.to(b_RO.dtype), pair.B_rO.to(b_RO.dtype)), error)
        return found
