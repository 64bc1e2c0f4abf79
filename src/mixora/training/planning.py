"""A plan and its memory for a base of any size, from its configuration alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from mixora.bases import Task, sketch_base
from mixora.config import did_you_mean, parse
from mixora.conversion.crafting import craft
from mixora.display.stages import Stage, silently
from mixora.errors import ConfigError
from mixora.footprint import STRATEGIES, Footprint, Loss, Memory, Parameters, Single, Strategy, count_base, estimate
from mixora.planning.plan import Plan
from mixora.training.batch_loss import compute_loss
from mixora.training.run_config import AdapterSection, ModelSection, check_names
from mixora.tuner import MixoraConfig, plan


def _loss_of(model: Any, batch: dict[str, Tensor], fused: bool) -> Tensor:
    return compute_loss(model, batch, fused_loss=fused)[0]


LOSSES: dict[bool, Loss] = {fused: partial(_loss_of, fused=fused) for fused in (True, False)}
"""The loss of a batch, by whether it is fused with the head."""


@dataclass(frozen=True)
class Outlook:
    """What a run would train and take: `length` tokens in a row, `footprints` by strategy."""

    plan: Plan
    parameters: Parameters
    length: int
    footprints: list[Footprint]


def plan_without_weights(
    tree: Mapping[str, Any],
    batch: int,
    length: int | None,
    *,
    processes: int = 1,
    strategies: Sequence[str] = (),
    recomputes: bool = False,
) -> Outlook:
    """The plan for a run's `model` and `adapter`, and the footprint of a training step on each of `processes`.

    `length` is 512 tokens, or what the base takes, where it is not given. `strategies`: how more than one process share
    the work. `recomputes`: activation checkpointing. The base stands on the meta device: a plan for 70 billion
    parameters takes seconds. Of `tree`, other sections are not looked at. Raises `ConfigError` or `ModelError`.
    """
    check_names(tree)
    base = parse(ModelSection, tree.get("model", {}), "model")
    adapter = parse(AdapterSection, tree.get("adapter", {}), "adapter").build()
    kinds = _read_strategies(processes, strategies)
    model = sketch_base(base.base, task=_task_of(base), dtype=base.dtype)
    table, counts = plan(model, adapter), count_base(model)
    longest = longest_row(model)
    if length is not None and length > longest:
        raise ConfigError(f"length: got {length}; valid for {base.base}: at most {longest} tokens")
    length = length or min(512, longest)
    found = estimate(_adapt(model, adapter, recomputes), batch, length, LOSSES, kinds, processes)
    return Outlook(table, Parameters(*counts, table.parameters, table.active_parameters), length, found)


def _read_strategies(processes: int, names: Sequence[str]) -> list[type[Strategy]]:
    if processes == 1:
        if names:
            raise ConfigError(f"strategy: got {', '.join(names)} for one process; valid: with processes=2 or more")
        return [Single]
    for name in names:
        if name not in STRATEGIES:
            raise ConfigError(f"strategy: got {name!r}{did_you_mean(name, STRATEGIES)}")
    return [kind for name, kind in STRATEGIES.items() if name in (names or STRATEGIES)]


def _task_of(section: ModelSection) -> Task | None:
    return None if section.task == "auto" else section.task


def longest_row(model: PreTrainedModel) -> int:
    """The tokens of the longest row that a model takes; 512 where it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or 512


def _adapt(model: PreTrainedModel, adapter: MixoraConfig, recomputes: bool) -> Any:
    adapted: Any = get_peft_model(model, adapter)
    if recomputes:
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.enable_input_require_grads()
    return adapted


def weigh(
    model: PreTrainedModel, adapter: MixoraConfig, batch: int, length: int, *, fused: bool, recomputes: bool
) -> Memory:
    """Memory of a training step on one process; `model` stands on the meta device, and is changed."""
    [found] = estimate(_adapt(model, adapter, recomputes), batch, length, {fused: LOSSES[fused]})
    return found.memory


def craft_adapter(
    tree: Mapping[str, Any],
    out: Path,
    seed: int,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Stage = silently,
) -> Plan:
    """`mixora.craft` by a run's `model` and `adapter`; of `tree`, other sections are not looked at."""
    check_names(tree)
    base = parse(ModelSection, tree.get("model", {}), "model")
    adapter = parse(AdapterSection, tree.get("adapter", {}), "adapter").build()
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"overwrite": overwrite, "dry_run": dry_run, "progress": progress}
    return craft(base.base, out, adapter, task=_task_of(base), dtype=base.dtype, **settings)
