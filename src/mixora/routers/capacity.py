"""Which (token, slot) assignments an expert of limited capacity lets in (SiRA, 2311.09179; GShard, 2006.16668)."""

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from mixora.config import Strict
from mixora.routing import Tokens

Order = Literal["token", "choice", "priority"]


class CapacityConfig(Strict):
    """How many (token, slot) assignments an expert accepts from one routing group of S real tokens.

    C = max(min_capacity, ceil(capacity_factor * S * K / E)); with `count_slots` off, max(min_capacity,
    round(capacity_factor * S / E)). No factor: no limit. `group`: a sequence, or the whole batch. `admission`: the
    order in which an expert serves its assignments: `token` by token (causal), `choice` all first choices before all
    second ones (GShard), `priority` by falling probability; the latter two let a later token displace an earlier one.
    """

    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    min_capacity: Annotated[int, Field(ge=0, le=2**31 - 1)] = 4
    count_slots: bool = True
    group: Literal["sequence", "batch"] = "sequence"
    admission: Order = "token"
    capacity_at_inference: bool = False


def admit(
    config: CapacityConfig, experts_TK: Tensor, assigned_TK: Tensor, priority_TK: Tensor, tokens: Tokens, experts: int
) -> Tensor:
    """Those of the assigned slots that find a place with one of `experts` experts: bool [T, K].

    `priority_TK` ranks slots under admission by priority. Slots that are not assigned take no place.
    """
    if config.group == "batch":
        tokens = replace(tokens, group_T=torch.zeros_like(tokens.group_T))
    queue = _queue(config.admission, priority_TK)
    # one line per (group, expert); what is not assigned stands in a last line of its own
    line_TK = torch.where(assigned_TK, tokens.group_T[:, None] * experts + experts_TK, len(experts_TK) * experts)
    place = torch.arange(len(queue), device=queue.device)
    line, by_line = line_TK.flatten()[queue].sort(stable=True)
    is_first = torch.ones_like(line, dtype=torch.bool)
    is_first[1:] = line[1:] != line[:-1]
    first_place = torch.where(is_first, place, 0).cummax(0).values
    before_me = torch.empty_like(place)
    before_me[queue[by_line]] = place - first_place
    limit_T = _limit_T(config, tokens, experts_TK.shape[1], experts)
    return assigned_TK & (before_me.reshape(experts_TK.shape) < limit_T[:, None])


def _queue(order: Order, priority_TK: Tensor) -> Tensor:
    """Indices of the flattened [T, K] slots in the order in which they are served."""
    if order == "priority":
        return priority_TK.flatten().argsort(descending=True, stable=True)
    slot_TK = torch.arange(priority_TK.numel(), device=priority_TK.device).reshape(priority_TK.shape)
    return (slot_TK.T if order == "choice" else slot_TK).flatten()


def _limit_T(config: CapacityConfig, tokens: Tokens, top_k: int, experts: int) -> Tensor:
    """C of each token's group: int64 [T]."""
    assert config.capacity_factor is not None
    size_G = torch.zeros_like(tokens.group_T).scatter_add(0, tokens.group_T, tokens.valid_T.long())
    if config.count_slots:
        # a product such as 40 * 1.1 * 2 / 8 lies a rounding error above 11: it must not cost a twelfth place
        wanted_G = (size_G.double() * (config.capacity_factor * top_k / experts) - 1e-9).ceil()
    else:
        wanted_G = (size_G.double() * (config.capacity_factor / experts)).round()
    return wanted_G.long().clamp(min=config.min_capacity)[tokens.group_T]
