"""What the routers do on given batches, as plain numbers."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mixora.errors import ModelError
from mixora.passes import tracing
from mixora.routing import Observation, Routing


def inspect(model: nn.Module, batch: Mapping[str, Tensor] | Iterable[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """What each site's router does with the real tokens of a batch (or of several), in evaluation mode.

    Returns a list with a dictionary per site and active adapter: `path`, `adapter`, `num_experts`, `top_k`; `load`
    (share of the assignments that chose each expert, sums to 1; where routing is soft, the mean weight of each expert);
    `experts_per_token` (mean number of experts that a token chose); `entropy` (mean over tokens of the router's
    entropy, in nats; None for routers without probabilities); `max_entropy` (that of even probabilities, log
    num_experts, to which null experts add); `dropped_share` (share of the assignments that the capacity limit would
    turn away in training); `dead_experts` (indices of experts that no token chose).
    Weights, gradients and mode of the model stay as they are. Raises `ModelError` for a model without active sites.
    """
    tallies: dict[tuple[str, str], Tally] = {}
    for observations in observe(model, [batch] if isinstance(batch, Mapping) else batch):
        for seen in observations:
            tallies.setdefault((seen.path, seen.adapter), Tally(seen.routing.num_experts)).add(seen.routing)
    return [{"path": path, "adapter": adapter, **tally.numbers()} for (path, adapter), tally in tallies.items()]


def observe(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Iterator[list[Observation]]:
    """What the routers decide on each batch, in evaluation mode and without gradients.

    Raises `ModelError` for a model without active sites.
    """
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for batch in batches:
            with torch.no_grad(), tracing() as trace:
                model(**{name: tensor.to(device) for name, tensor in batch.items()})
            if not trace.observations:
                raise ModelError(
                    "no active mixture adapter was run: got a model without one, or with its adapters disabled"
                )
            yield trace.observations
    finally:
        model.train(was_training)


def load_by_group(model: nn.Module, batches: Mapping[str, Iterable[Mapping[str, Tensor]]]) -> dict[str, Any]:
    """How the load of the experts differs between groups of rows (domains, tasks, languages).

    `batches` holds the batches of each group. Returns `groups` (their names), `sites` (paths of the routed sites) and
    `load`, nested lists `[site][group][expert]` of shares that sum to 1 over the experts.
    """
    measured = {group: inspect(model, of_group) for group, of_group in batches.items()}
    routed = [site["path"] for site in next(iter(measured.values())) if site["num_experts"] > 1]
    loads = {group: {site["path"]: site["load"] for site in sites} for group, sites in measured.items()}
    return {"groups": list(batches), "sites": routed, "load": [[loads[g][path] for g in batches] for path in routed]}


class Tally:
    """Counts over several routings of one site; `numbers` are those of `inspect`."""

    def __init__(self, num_experts: int) -> None:
        self.chosen_E = torch.zeros(num_experts, dtype=torch.float64)
        self.entropy, self.tokens, self.assigned, self.admitted, self.top_k = 0.0, 0, 0, 0, 0
        self.choices = 0

    def add(self, routing: Routing) -> None:
        """The routing of one batch."""
        assigned = int(routing.assigned_TK.sum())
        self.assigned += assigned
        self.chosen_E += routing.load_E().double().cpu() * assigned
        self.admitted += int(routing.admitted_TK.sum())
        self.tokens += int(routing.valid_T.sum())
        self.top_k = routing.experts_TK.shape[1]
        if routing.probs_TE is not None:
            self.choices = routing.probs_TE.shape[1]
            probs_TE = routing.probs_TE[routing.valid_T].double()
            self.entropy -= float(torch.xlogy(probs_TE, probs_TE).sum())

    def numbers(self) -> dict[str, Any]:
        """Shares and means over all of them."""
        return {
            "num_experts": len(self.chosen_E),
            "top_k": self.top_k,
            "load": (self.chosen_E / max(self.assigned, 1)).tolist(),
            "experts_per_token": self.assigned / max(self.tokens, 1),
            "entropy": self.entropy / max(self.tokens, 1) if self.choices else None,
            "max_entropy": math.log(self.choices) if self.choices else None,
            "dropped_share": 1 - self.admitted / self.assigned if self.assigned else 0.0,
            "dead_experts": [expert for expert, count in enumerate(self.chosen_E.tolist()) if round(count) == 0],
        }
