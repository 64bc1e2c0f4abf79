"""What allocators need that look at the frozen weight of each site."""

from collections.abc import Iterable
from typing import Any

from mixora.contracts import Candidate
from mixora.errors import ModelError


def check_matrices(candidates: Iterable[Candidate]) -> None:
    """`ModelError` for a site that is no linear module: it has no matrix of its own, or as many as it has linears."""
    for site in candidates:
        # packed weights are matrices too, whatever they are called
        weights: list[Any] = [getattr(site.module, name, None) for name in ("weight", "qweight", "W_q")]
        if not any(weight is not None and weight.dim() > 1 for weight in weights):
            raise ModelError(
                f"{site.path}: is a whole module ({type(site.module).__name__}) without one weight matrix; "
                "valid for allocator.kind: 'groups', 'proportional'"
            )
