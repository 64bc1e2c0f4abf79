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
        for seen in observations:
            routing = seen.routing
            if routing.num_experts < 2:
                continue
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
    names = sorted(set(groups))
    labels = torch.tensor([names.index(group) for group in groups])
    generator = torch.Generator().manual_seed(seed)
    real = _information(counts, labels, len(names))
    dealt = [
        _information(counts, labels[torch.randperm(len(labels), generator=generator)], len(names))
        for _ in range(PERMUTATIONS)
    ]
    reached = sum(value >= real for value in dealt)
    return {
        "information": real,
        "by_chance": sum(dealt) / len(dealt),
        "p": (reached + 1) / (len(dealt) + 1),
        "sites": len(counts),
        "groups": names,
    }


def _with_batches(model: nn.Module, batches: list[Mapping[str, Tensor]]) -> Iterable[tuple[Mapping[str, Tensor], Any]]:
    return zip(batches, observe(model, batches), strict=True)


def _information(counts: Mapping[str, Tensor], labels: Tensor, groups: int) -> float:
    """Mean over sites of `sum p(g, e) log (p(g, e) / p(g) p(e))`."""
    found = []
    for rows_NE in counts.values():
        joint_GE = torch.zeros(groups, rows_NE.shape[1], dtype=torch.float64).index_add_(0, labels, rows_NE)
        joint_GE = joint_GE / joint_GE.sum()
        apart_GE = joint_GE.sum(dim=1, keepdim=True) * joint_GE.sum(dim=0, keepdim=True)
        found.append(float(torch.xlogy(joint_GE, joint_GE / apart_GE.clamp_min(1e-300)).sum()))
    return sum(found) / len(found)
