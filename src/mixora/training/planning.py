"""A plan and its memory for a base of any size, from its configuration alone."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model
from transformers import PreTrainedModel

from mixora.bases import Task, sketch_base
from mixora.config import parse
from mixora.crafting import craft
from mixora.errors import ConfigError
from mixora.memory import estimate_memory
from mixora.plan import Plan
from mixora.stages import Stage, silently
from mixora.training.run_config import AdapterSection, ModelSection, check_names
from mixora.tuner import MixoraConfig, plan


def plan_without_weights(tree: Mapping[str, Any], batch: int, length: int | None) -> tuple[Plan, dict[str, int], int]:
    """The plan for a run's `model` and `adapter`, the memory of a training step in bytes by part, and its row length.

    `length` is 512 tokens, or what the base takes, where it is not given.
    The base stands on the meta device: a plan for 70 billion parameters takes seconds. Of `tree`, other sections are
    not looked at. Raises `ConfigError` or `ModelError`.
    """
    check_names(tree)
    base = parse(ModelSection, tree.get("model", {}), "model")
    adapter = parse(AdapterSection, tree.get("adapter", {}), "adapter").build()
    model = sketch_base(base.base, task=_task_of(base), dtype=base.dtype)
    table = plan(model, adapter)
    longest = longest_row(model)
    if length is not None and length > longest:
        raise ConfigError(f"length: got {length}; valid for {base.base}: at most {longest} tokens")
    length = length or min(512, longest)
    return table, weigh(model, adapter, batch, length), length


def _task_of(section: ModelSection) -> Task | None:
    return None if section.task == "auto" else section.task


def longest_row(model: PreTrainedModel) -> int:
    """The tokens of the longest row that a model takes; 512 where it does not say."""
    return getattr(model.config, "max_position_embeddings", None) or 512


def weigh(model: PreTrainedModel, adapter: MixoraConfig, batch: int, length: int) -> dict[str, int]:
    """Bytes of a training step by part, and their `total`; `model` stands on the meta device, and is changed."""
    memory = estimate_memory(get_peft_model(model, adapter), batch, length)
    return {**vars(memory), "total": memory.total}


def craft_adapter(
    tree: Mapping[str, Any],
    out: str,
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
