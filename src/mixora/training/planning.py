"""A plan and its memory for a base of any size, from its configuration alone."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from mixora.bases import DTYPES, Task, read_base_config
from mixora.config import parse
from mixora.crafting import craft
from mixora.errors import ConfigError, ModelError
from mixora.memory import estimate_memory
from mixora.plan import Plan
from mixora.training.run_config import AdapterSection, ModelSection
from mixora.tuner import plan

_CLASSES: dict[Task, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "seq2seq-lm": AutoModelForSeq2SeqLM,
    "sequence-classification": AutoModelForSequenceClassification,
}


def plan_without_weights(tree: Mapping[str, Any], batch: int, length: int | None) -> tuple[Plan, dict[str, int], int]:
    """The plan for a run's `model` and `adapter`, the memory of a training step in bytes by part, and its row length.

    `length` is 512 tokens, or what the base takes, where it is not given.
    The base stands on the meta device: a plan for 70 billion parameters takes seconds. Of `tree`, other sections are
    not looked at. Raises `ConfigError` or `ModelError`.
    """
    base = parse(ModelSection, tree.get("model", {}), "model")
    adapter = parse(AdapterSection, tree.get("adapter", {}), "adapter").build()
    model = build_on_meta(base, None if base.task == "auto" else base.task)
    table = plan(model, adapter)
    longest = getattr(model.config, "max_position_embeddings", None) or 512
    if length is not None and length > longest:
        raise ConfigError(f"length: got {length}; valid for {base.base}: at most {longest} tokens")
    length = length or min(512, longest)
    memory = estimate_memory(get_peft_model(model, adapter), batch, length)
    return table, {**vars(memory), "total": memory.total}, length


def build_on_meta(base: ModelSection, task: Task | None) -> PreTrainedModel:
    """The base on the meta device, without weights; where `task` is None, the one that a base without data has.

    Raises `ModelError` for a base that cannot do the task, and for what `resolve_base` refuses.
    """
    config = read_base_config(base.base)
    task = task or ("seq2seq-lm" if config.is_encoder_decoder else "causal-lm")
    try:
        with torch.device("meta"):
            return _CLASSES[task].from_config(config, dtype=DTYPES[base.dtype])
    except ValueError as error:
        raise ModelError(f"{base.base}: has no class for task {task!r}: {str(error).splitlines()[0]}") from None


def craft_adapter(tree: Mapping[str, Any], out: str, seed: int) -> Plan:
    """`mixora.craft` by a run's `model` and `adapter`; of `tree`, other sections are not looked at."""
    base = parse(ModelSection, tree.get("model", {}), "model")
    adapter = parse(AdapterSection, tree.get("adapter", {}), "adapter").build()
    torch.manual_seed(seed)
    return craft(base.base, out, adapter, task=None if base.task == "auto" else base.task, dtype=base.dtype)
