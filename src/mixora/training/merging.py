"""Merging from folders: the result of a run or a saved adapter, its base, and rows to fit and to measure on."""

import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixora.bases import load_base, name_classes, read_tokenizer, sketch_base
from mixora.cards import Facts, show_name
from mixora.config import merge_trees, parse
from mixora.errors import ConfigError
from mixora.files.folders import check_folder
from mixora.loading import check_files, count_outputs, from_pretrained, read_adapter_config, task_of
from mixora.merging import Approximation, Form, Merged, foresee, merge
from mixora.training.material import (
    Material,
    batches_of_tasks,
    encode_rows,
    make_examples,
    read_material,
    sample_batches,
)
from mixora.training.past import find_labels, read_past
from mixora.training.progress import Progress
from mixora.training.rows import Past
from mixora.training.run_config import ModelSection, RunConfig, read_settings
from mixora.training.run_folder import RUN_FILE

FIT_ROWS = 256


def merge_folder(
    source: Path,
    out: Path,
    changes: Mapping[str, Any],
    progress: Progress,
    *,
    to: Form = "peft-lora",
    rank: int | None = None,
    uniform_rank: bool = False,
    soup: bool = False,
    fit_rows: int | None = None,
    base_id: str | None = None,
    facts: Facts | None = None,
    overwrite: bool = False,
) -> Merged:
    """`mixora.merge` for the folder of a run, or of a saved adapter; `changes` are settings of a run.

    `base_id`: what the result calls its base, where that is not the name by which it is read here. `facts`: for the
    card, as in `mixora.merge`.
    With `soup`, the experts are chosen on the evaluation rows. With `fit_rows`, sites routed by the input get the
    nearest LoRA on as many training rows, drawn by the run's seed, and the change is measured on the evaluation rows.
    Without either, the data are not looked at.
    """
    needs_rows = soup or fit_rows is not None
    adapter, tree = find_settings(source, changes, needs_rows)
    check_folder(out, overwrite, [source, tree["model"]["base"]])
    progress.say(f"reading {adapter} and {tree['model']['base']}")
    held_out, approximation = None, None
    with progress.task("reading"):
        if needs_rows:
            config = parse(RunConfig, tree)
            material = read_material(config, past=_find_past(source))
            model, tokenizer = from_pretrained(material.model, adapter), material.tokenizer
            approximation = None if fit_rows is None else sample(material, config, fit_rows)
            held_out = _all_batches(material, config) if soup else None
        else:
            model, tokenizer = load_adapted(source, adapter, parse(ModelSection, tree["model"], "model"))
    if base_id is not None:
        model.peft_config[model.active_adapter].base_model_name_or_path = base_id
    settings: dict[str, Any] = {"rank": rank, "uniform_rank": uniform_rank, "overwrite": overwrite, "soup": held_out}
    companions: dict[str, Any] = {"tokenizer": tokenizer, "facts": facts, "progress": progress.task}
    return merge(model, out, to=to, approximation=approximation, **settings, **companions)


def foresee_merge(
    source: Path,
    out: Path,
    changes: Mapping[str, Any],
    *,
    to: Form = "peft-lora",
    rank: int | None = None,
    uniform_rank: bool = False,
    soup: bool = False,
    fit_rows: int | None = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """How `merge_folder` would get to each site, by path; reads no weights of the base."""
    needs_rows = soup or fit_rows is not None
    adapter, tree = find_settings(source, changes, needs_rows)
    check_folder(out, overwrite, [source, tree["model"]["base"]])
    if needs_rows:
        base = read_material(parse(RunConfig, tree), with_weights=False, past=_find_past(source)).model
        model = get_peft_model(base, read_adapter_config(adapter))
    else:
        model = sketch_adapted(adapter, parse(ModelSection, tree["model"], "model"))
    return foresee(model, to=to, rank=rank, uniform_rank=uniform_rank, approximate=fit_rows is not None)


def find_settings(source: Path, changes: Mapping[str, Any], needs_rows: bool) -> tuple[Path, dict[str, Any]]:
    """The folder of the adapter, and the settings of its run as far as they are known.

    `ConfigError` for `changes` of anything but the base where no rows are needed, and for an adapter without a base.
    """
    ineffective = [] if needs_rows else sorted(changes.keys() - {"model"})
    if ineffective:
        raise ConfigError(
            f"{ineffective[0]}: an exact export looks at no rows; valid: with --approximate (routed experts) or --soup "
            "(drawn ones)"
        )
    tree: dict[str, Any] = {}
    adapter = source
    if (source / RUN_FILE).is_file():
        tree, adapter = read_settings(source / RUN_FILE), source / "adapter"
    check_files(adapter)
    tree = merge_trees(tree, changes)
    model = {"base": read_adapter_config(adapter).base_model_name_or_path, **tree.get("model", {})}
    if not model["base"]:
        raise ConfigError(f"model.base: {adapter} does not name its base; valid: --model BASE")
    return adapter, {**tree, "model": model}


def _find_past(source: Path) -> Past | None:
    """Of the folder of a run; a saved adapter alone has none."""
    return read_past(source) if (source / RUN_FILE).is_file() else None


def sketch_adapted(adapter: Path, section: ModelSection) -> PeftModel:
    """The base with the adapter, on the meta device."""
    config = read_adapter_config(adapter)
    return get_peft_model(sketch_base(section.base, task=task_of(config), dtype=section.dtype), config)


def load_adapted(source: Path, adapter: Path, section: ModelSection) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """The base with the adapter, and its tokenizer. `source`: the run that the adapter is of, or the adapter."""
    task = task_of(read_adapter_config(adapter))
    outputs = count_outputs(adapter) if task == "sequence-classification" else None
    base, _ = load_base(section.base, task=task, num_labels=outputs, dtype=section.dtype)
    name_classes(base, find_labels(source) or ())
    return from_pretrained(base, adapter), read_tokenizer(section.base, adapter)


def sample(material: Material, config: RunConfig, fit_rows: int) -> Approximation:
    """Batches of training rows to fit on, drawn by the run's seed, and of all evaluation rows to measure on."""
    tasks = material.train_rows()
    if fit_rows < 1:
        raise ConfigError(f"fit_rows: got {fit_rows}; valid: 1 or more")
    known = [(name, number) for name, rows in tasks.items() for number in range(len(rows))]
    chosen = random.Random(config.train.seed).sample(range(len(known)), min(fit_rows, len(known)))
    drawn: dict[str, list[int]] = {}
    for name, number in (known[place] for place in chosen):
        drawn.setdefault(name, []).append(number)
    picked = {
        name: replace(tasks[name], rows=tuple(tasks[name][n] for n in numbers)) for name, numbers in drawn.items()
    }
    encoded = encode_rows(material, config, picked, packing=False)
    dataset = concatenate_datasets([part.dataset for part in encoded.values()])
    return Approximation(
        fit=list(sample_batches(material, dataset, config)),
        held_out=_all_batches(material, config),
        origin=f"{len(chosen)} rows of {', '.join(show_name(rows.origin) for rows in picked.values())}",
    )


def _all_batches(material: Material, config: RunConfig) -> list[Mapping[str, Tensor]]:
    """All evaluation rows."""
    return batches_of_tasks(make_examples(material, config), config, None)
