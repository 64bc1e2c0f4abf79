"""A dense model becomes sparse: an adapter with which it computes what it did, to the bit, until it is trained."""

import copy
from pathlib import Path

import torch
from peft import get_peft_model

from mixora.bases import TASK_TYPES, Task, language_task_of, load_base, read_base_config, sketch_base
from mixora.cards import Card, facts_of, write_card
from mixora.display.stages import Stage, silently
from mixora.files.folders import check_folder, claim_folder
from mixora.planning.plan import Plan
from mixora.tuner import MixoraConfig, plan, recipe


def craft(
    base: str | Path,
    out: str | Path,
    config: MixoraConfig | None = None,
    *,
    task: Task | None = None,
    dtype: str | torch.dtype = "float32",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Stage = silently,
) -> Plan:
    """Write the adapter of `config` (the recipe `pesc` by default) for the dense model `base` to the folder `out`.

    `base` is what `mixora.bases.load_base` takes; `task` follows from it where it is not given. The experts are drawn
    from the ambient generator, in `dtype`. Returns the plan. `overwrite`: replace what mixora wrote to `out` before.
    `dry_run`: check everything, read no weights and write nothing. `progress`: told what is being done. Raises
    `ConfigError` (also where `out` is not empty) and `ModelError` (PESC, arXiv 2401.02731).
    """
    check_folder(out, overwrite, [base])
    # the caller's config stays as it is: it may serve for another model
    config = copy.copy(config or recipe("pesc"))
    with progress(f"reading {base}"):
        task = task or language_task_of(read_base_config(base))
        dense = sketch_base(base, task=task, dtype=dtype) if dry_run else load_base(base, task=task, dtype=dtype)[0]
    config.task_type = TASK_TYPES[task]
    table = plan(dense, config)
    if dry_run:
        return table
    with progress("making the experts"):
        crafted = get_peft_model(dense, config, autocast_adapter_dtype=False)
        # embeddings are not ours to save, and looking for them would ask the hub for the base
        folder = claim_folder(out, overwrite, [base])
        crafted.save_pretrained(str(folder), save_embedding_layers=False)
        write_card(folder, Card("adapter", facts_of(crafted.peft_config["default"], base=str(base))))
    return table
