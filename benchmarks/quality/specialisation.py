"""Do experts specialise? Mutual information of expert and group of rows, against groups that are dealt out anew."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixora.diagnostics.measure import observe

PERMUTATIONS = 999


def count_by_row(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """How many assignments of each row went to each expert, `[rows, experts]`, by the path of each routed site."""
    counts: dict[str, list[Tensor]] = {}
    for batch, observations in _with_batches(model, list(batches)):
        rows = len(batch["input_ids"])
        routed = [seen for seen in observations if seen.routing.num_experts > 1]
        if not routed:
            # nor in another batch
            return {}
        for seen in routed:
            routing = seen.routing
            chosen_TE = torch.zeros(len(routing.valid_T), routing.num_experts, dtype=torch.float64)
            chosen_TE.scatter_add_(1, routing.experts_TK, routing.assigned_TK.double())
            counts.setdefault(seen.path, []).append(chosen_TE.view(rows, -1, routing.num_experts).sum(dim=1))
    return {path: torch.cat(parts) for path, parts in counts.items()}


def judge_specialisation(counts: Mapping[str, Tensor], groups: Sequence[str], seed: int = 0) -> dict[str, Any]:
    """The mean over sites of the mutual information of expert and group, in nats, and a permutation test of it.

    Groups are dealt out anew over rows, not tokens, since the tokens of a row are no independent draws. `p`: the share
    of such deals, the real one among them, with as much information; `by_chance`: their mean. Without routed sites
    there is nothing to tell.
    """
    if not counts:
        return {"sites": 0}
    labels = _number(groups)
    generator = torch.Generator().manual_seed(seed)
    real = _information(counts, labels)
    dealt = [
        _information(counts, labels[torch.randperm(len(labels), generator=generator)]) for _ in range(PERMUTATIONS)
    ]
    reached = sum(value >= real for value in dealt)
    return {
        "information": real,
        "by_chance": sum(dealt) / len(dealt),
        "p": (reached + 1) / (len(dealt) + 1),
        "sites": len(counts),
        "groups": sorted(set(groups)),
    }


def measure_information(counts: Mapping[str, Tensor], groups: Sequence[str]) -> float | None:
    """What `judge_specialisation` calls information, without its test; nothing where nothing is routed."""
    return _information(counts, _number(groups)) if counts else None


def _number(groups: Sequence[str]) -> Tensor:
    names = sorted(set(groups))
    return torch.tensor([names.index(group) for group in groups])


def _with_batches(model: nn.Module, batches: list[Mapping[str, Tensor]]) -> Iterable[tuple[Mapping[str, Tensor], Any]]:
    return zip(batches, observe(model, batches), strict=True)


def _information(counts: Mapping[str, Tensor], labels: Tensor) -> float:
    """Mean over sites of `sum p(g, e) log (p(g, e) / p(g) p(e))`."""
    found, groups = [], int(labels.max()) + 1
    for rows_NE in counts.values():
        joint_GE = torch.zeros(groups, rows_NE.shape[1], dtype=torch.float64).index_add_(0, labels, rows_NE)
        joint_GE = joint_GE / joint_GE.sum()
        apart_GE = joint_GE.sum(dim=1, keepdim=True) * joint_GE.sum(dim=0, keepdim=True)
        found.append(float(torch.xlogy(joint_GE, joint_GE / apart_GE.clamp_min(1e-300)).sum()))
    return sum(found) / len(found)
