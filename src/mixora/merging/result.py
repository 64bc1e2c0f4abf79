"""What a merge did, as plain data."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mixora.merging.comparison import Comparison
from mixora.merging.soup import Soup
from mixora.planning.plan import star_layer

Form = Literal["peft-lora", "averaged", "dense"]


@dataclass(frozen=True)
class MergedSite:
    """One site. `rank`: of its pair of matrices. `error`: relative, in the Frobenius norm; 0 where `exact`.

    An adapter behind a module is `averaged`: the mean of the experts' weights, which is how the method serves.

    Of the weight's change where `truncated`, of what the experts add to the outputs over the fitted tokens where
    `fitted`.
    """

    path: str
    method: Literal["exact", "averaged", "truncated", "fitted"]
    rank: int
    error: float


@dataclass(frozen=True)
class Merged:
    """The result of `mixora.merge`.

    `form`: a LoRA adapter that plain PEFT reads, an adapter of ours with one expert (`averaged`), or a dense model.
    `fitted_on` and `changes`: the data of an approximation, and what it changes. `soup`: which experts the mean is of.
    """

    out: Path
    form: Form
    base: str
    recipe: str | None
    sites: tuple[MergedSite, ...]
    fitted_on: str | None = None
    changes: Comparison | None = None
    soup: Soup | None = None

    def rows(self) -> list[dict[str, Any]]:
        """A line for the sites that differ only in their layer: ranks, mean and largest error."""
        groups: dict[tuple[str, str], list[MergedSite]] = {}
        for site in self.sites:
            groups.setdefault((star_layer(site.path), site.method), []).append(site)
        return [_row(kind, method, sites) for (kind, method), sites in groups.items()]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**asdict(self), "out": str(self.out)}


def _row(kind: str, method: str, sites: list[MergedSite]) -> dict[str, Any]:
    ranks, errors = sorted({site.rank for site in sites}), [site.error for site in sites]
    return {
        "sites": kind,
        "count": len(sites),
        "method": method,
        "rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}",
        "mean_error": sum(errors) / len(errors),
        "largest_error": max(errors),
    }
