"""What `kernel: auto` stands for: `stacked` up to a limit of R / K, `sorted` above it.

R is the sum of the ranks that a site computes at once, K the number of experts of a token. `stacked` computes R columns
for each token, `sorted` about K * R / E and the way there and back. Where every token uses every expert, nothing is
computed in vain, whatever R is.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mixora.contracts import Shape
from mixora.errors import ConfigError
from mixora.host.devices import kind_of
from mixora.kernels import KERNELS

# By `devices.kind_of`. `cpu` and `amx`: what `mixora bench kernels` found, as the newest files in benchmarks/results
# say; where matrix units make products in bf16 cheap, it takes many to outweigh the way there and back.
# `cuda`: an estimate from the traffic and the arithmetic of an H100, not a measurement.
STACKED_UP_TO: Mapping[str, Mapping[str, int]] = {
    "cpu": {"float32": 40, "bfloat16": 72},
    "amx": {"float32": 64, "bfloat16": 496},
    "cuda": {"float32": 340, "bfloat16": 340},
}


@dataclass(frozen=True)
class Served:
    """A site and its kernel. `shape`: of the experts that are computed at once. `is_named`: a rule names the kernel."""

    kernel: str
    shape: Shape
    top_k: int
    is_named: bool


@dataclass(frozen=True)
class Choice:
    """How kernels are chosen for a model: the dtype it computes in, and the largest R / K for `stacked`.

    `is_stored`: the adapter exists already. Where the kernel that a rule names cannot serve, `auto` does then.
    """

    dtype: torch.dtype
    limit: int
    is_stored: bool = False

    @classmethod
    def on(cls, model: nn.Module, is_stored: bool = False) -> "Choice":
        """The choice on a model; one on the meta device counts as on CUDA where there is any, else as on this CPU."""
        first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
        limits = STACKED_UP_TO[kind_of(first)]
        return cls(first.dtype, limits["bfloat16" if first.dtype.itemsize == 2 else "float32"], is_stored)

    def settle(self, kernel: str, shape: Shape, top_k: int, where: str, joins: bool = False) -> str:
        """The kernel of a site: `kernel` itself, or what `auto` stands for; `ConfigError` where it cannot serve.

        `shape`: of the experts that are computed at once. `joins`: experts and router do. `where` heads the message.
        """
        able = [name for name in KERNELS if KERNELS[name].objection(shape, self.dtype) is None]
        able = [name for name in able if joins or not KERNELS[name].joins]
        if kernel in able:
            return kernel
        if kernel != "auto" and not self.is_stored:
            reason = KERNELS[kernel].objection(shape, self.dtype)
            reason = reason or "computes LoRA experts under routers that are linear, or do not look at their input"
            raise ConfigError(f"{where}: {kernel!r} {reason}; valid here: {', '.join(['auto', *able])}")
        uses_all = len(shape.ranks) == top_k
        if uses_all or sum(shape.ranks) / top_k <= self.limit:
            return "joint" if joins else "stacked"
        return "sorted"

    def explain(self, sites: Sequence[Served]) -> tuple[str, ...]:
        """Each kernel in use, with the reasons."""
        by_kernel = {name: [site for site in sites if site.kernel == name] for name in KERNELS}
        return tuple(f"{name} ({', '.join(self._reasons(served))})" for name, served in by_kernel.items() if served)

    def _reasons(self, served: list[Served]) -> Iterable[str]:
        chosen = [site for site in served if not site.is_named]
        breadths = [sum(site.shape.ranks) / site.top_k for site in chosen if len(site.shape.ranks) > site.top_k]
        if breadths:
            low, high = min(breadths), max(breadths)
            span = f"{low:g}" if low == high else f"{low:g}-{high:g}"
            yield f"R/K {span} {'≤' if high <= self.limit else '>'} {self.limit}"
        if len(breadths) < len(chosen):
            yield "all experts in use"
        if len(chosen) < len(served):
            yield "named by a rule"
        # `triton` keeps the sums of its products in fp32
        rounded = {"joint": "outputs", "triton": "weights"}.get(served[0].kernel)
        if rounded and self.dtype.itemsize < 4:
            yield f"router {rounded} in {str(self.dtype).removeprefix('torch.')}"
