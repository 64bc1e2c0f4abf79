"""A dense model becomes sparse: an adapter with which it computes what it did, to the bit, until it is trained."""

import copy
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoConfig

from mixora.bases import TASK_TYPES, Task, load_base, resolve_base
from mixora.folders import claim_folder
from mixora.plan import Plan
from mixora.tuner import MixoraConfig, plan, recipe


def craft(
    base: str | Path,
    out: str | Path,
    config: MixoraConfig | None = None,
    *,
    task: Task | None = None,
    dtype: str | torch.dtype = "float32",
) -> Plan:
    """Write the adapter of `config` (the recipe `pesc` by default) for the dense model `base` to the folder `out`.

    `base` is what `mixora.bases.load_base` takes; `task` follows from it where it is not given. The experts are drawn
    from the ambient generator, in `dtype`. Returns the plan. Raises `ConfigError` (also where `out` is not empty) and
    `ModelError` (PESC, arXiv 2401.02731).
    """
    folder = claim_folder(out)
    # the caller's config stays as it is: it may serve for another model
    config = copy.copy(config or recipe("pesc"))
    if task is None:
        is_encoder_decoder = AutoConfig.from_pretrained(str(resolve_base(base))).is_encoder_decoder
        task = "seq2seq-lm" if is_encoder_decoder else "causal-lm"
    config.task_type = TASK_TYPES[task]
    dense, _ = load_base(base, task=task, dtype=dtype)
    table = plan(dense, config)
    # embeddings are not ours to save, and looking for them would ask the hub for the base
    get_peft_model(dense, config, autocast_adapter_dtype=False).save_pretrained(
        str(folder), save_embedding_layers=False
    )
    return table
