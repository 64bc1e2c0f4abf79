"""What the routers do while they are trained, for logs and trackers, and the alarm when they collapse.

Read from the routings that the trainer's trace holds anyway: no further pass, no random draw, nothing that waits for
the device before a log is written. Sites whose routings have one shape are added up at once.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mixora.diagnostics.collapse import COLLAPSED, measure_evenness
from mixora.diagnostics.places import name_site
from mixora.diagnostics.verdict import AGAINST_COLLAPSE, name_some
from mixora.host.world import sum_over_processes
from mixora.mixture import mixtures_of
from mixora.routing import Observation, Routing, Trace

PREFIX = "routing/"
ALARMING_SHARE = 0.1
ALARMING_INTERVALS = 3


@dataclass(frozen=True)
class SiteFigures:
    """One site over a logging interval; `entropy` is a share of its maximum, None without probabilities."""

    entropy: float | None
    evenness: float | None
    largest_share: float
    dropped_share: float
    dead_experts: int


class _Kind(NamedTuple):
    """What routings share that are added up at once; `choices` of the router, 0 where it has no probabilities."""

    tokens: int
    slots: int
    experts: int
    choices: int
    is_soft: bool

    @classmethod
    def of(cls, routing: Routing) -> "_Kind":
        tokens, slots = routing.experts_TK.shape
        choices = 0 if routing.probs_TE is None else routing.probs_TE.shape[1]
        return cls(tokens, slots, routing.num_experts, choices, routing.is_soft)


class RoutingFigures:
    """Sums per site since they were last taken; batches may differ in shape."""

    def __init__(self) -> None:
        # by paths of S sites and number of choices: [S, E + 4]
        self._sums: dict[tuple[tuple[str, ...], int], Tensor] = {}

    @torch.no_grad()
    def add(self, model: nn.Module, trace: Trace) -> None:
        """The training passes of one micro-batch. Routers that do not look at their input are left out."""
        layers = {layer.path: layer for layer in mixtures_of(model)}
        alike: dict[_Kind, list[Observation]] = defaultdict(list)
        for seen in trace.observations:
            is_routed = seen.with_grad and seen.routing.num_experts > 1 and seen.path in layers
            if is_routed and not layers[seen.path].parts[seen.adapter].router.is_static:
                alike[_Kind.of(seen.routing)].append(seen)
        for kind, observations in alike.items():
            key = tuple(seen.path for seen in observations), kind.choices
            self._sums[key] = _add_up(kind, [seen.routing for seen in observations]) + self._sums.get(key, 0)

    def take(self) -> dict[str, SiteFigures]:
        """The figures of each site, by path, of the tokens of all processes, which must all call this; starts anew."""
        rows: dict[str, Tensor] = {}
        choices_of: dict[str, int] = {}
        for (paths, choices), sums_SN in self._sums.items():
            for path, row_N in zip(paths, sums_SN.unbind(), strict=True):
                rows[path] = row_N + rows.get(path, 0)
                choices_of[path] = choices
        self._sums.clear()
        # what one process puts together by the shape of its batches, another may not
        of_all = sum_over_processes({path: rows[path] for path in sorted(rows)})
        numbers = iter(torch.cat(list(of_all.values())).tolist() if of_all else [])
        rows_of = {path: list(islice(numbers, len(row_N))) for path, row_N in of_all.items()}
        return {path: _conclude(rows_of[path], choices_of[path]) for path in rows if rows_of[path][-1]}

    def state(self) -> dict[tuple[tuple[str, ...], int], Tensor]:
        """What a checkpoint keeps."""
        return dict(self._sums)

    def restore(self, state: dict[tuple[tuple[str, ...], int], Tensor]) -> None:
        """Go on from there."""
        self._sums = dict(state)


def _add_up(kind: _Kind, routings: Sequence[Routing]) -> Tensor:
    """For each of S routings: what each expert got; entropy, assigned, admitted, tokens. fp32 [S, E + 4]."""
    assigned_STK = torch.stack([r.assigned_TK for r in routings])
    shares_STK = torch.stack([r.weights_TK for r in routings]) if kind.is_soft else assigned_STK
    experts_STK = torch.stack([r.experts_TK for r in routings])
    valid_ST = torch.stack([r.valid_T for r in routings]).float()
    chosen_SE = valid_ST.new_zeros(len(routings), kind.experts)
    chosen_SE.scatter_add_(1, experts_STK.flatten(1), shares_STK.flatten(1).float())
    entropy_S = valid_ST.new_zeros(len(routings))
    if kind.choices:
        probs_STE = torch.stack([r.probs_TE for r in routings if r.probs_TE is not None]).float()
        entropy_S = -(torch.xlogy(probs_STE, probs_STE).sum(dim=-1) * valid_ST).sum(dim=-1)
    admitted_STK = torch.stack([r.admitted_TK for r in routings])
    sums = [entropy_S, assigned_STK.sum(dim=(1, 2)), admitted_STK.sum(dim=(1, 2)), valid_ST.sum(dim=1)]
    return torch.cat([chosen_SE, torch.stack([s.float() for s in sums], dim=1)], dim=1)


def _conclude(row: Sequence[float], choices: int) -> SiteFigures:
    *chosen, entropy, assigned, admitted, tokens = row
    total = sum(chosen)
    load = [count / total for count in chosen] if total else []
    return SiteFigures(
        entropy=entropy / tokens / math.log(choices) if choices > 1 else None,
        evenness=measure_evenness(load, assigned / tokens),
        largest_share=max(chosen) / tokens,
        dropped_share=1 - admitted / assigned if assigned else 0.0,
        dead_experts=chosen.count(0.0),
    )


def average(sites: Iterable[SiteFigures]) -> dict[str, float]:
    """The means over the sites, named as in a log: `routing/entropy`, `routing/evenness` and so on."""
    found: dict[str, list[float]] = defaultdict(list)
    for site in sites:
        for name, value in vars(site).items():
            if value is not None:
                found[PREFIX + name].append(value)
    return {name: sum(values) / len(values) for name, values in found.items()}


class CollapseAlarm:
    """Goes off once: when a share of the sites has been collapsed for some logging intervals in a row."""

    def __init__(self) -> None:
        self._intervals: dict[str, int] = defaultdict(int)
        self.note: str | None = None

    def hear(self, sites: Mapping[str, SiteFigures], step: int) -> bool:
        """The figures of one interval; whether this is the moment, of which `note` then tells."""
        for path, site in sites.items():
            is_collapsed = site.evenness is not None and site.evenness < COLLAPSED
            self._intervals[path] = self._intervals[path] + 1 if is_collapsed else 0
        hit = [path for path in sites if self._intervals[path] >= ALARMING_INTERVALS]
        if self.note is not None or len(hit) < max(ALARMING_SHARE * len(sites), 1):
            return False
        self.note = (
            f"Step {step}: the routers of {len(hit)} of {len(sites)} sites have collapsed; over {ALARMING_INTERVALS} "
            f"logging intervals nearly all tokens went to the same experts ({name_some(map(name_site, hit))}). "
            f"{AGAINST_COLLAPSE}"
        )
        return True

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"intervals": dict(self._intervals), "note": self.note}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._intervals, self.note = defaultdict(int, state["intervals"]), state["note"]
