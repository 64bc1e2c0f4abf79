"""The whole way of a run: load, plan, evaluate, train, evaluate again, save, read back, report."""

import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.bases import TASK_TYPES
from mixora.data import Encoded, encode
from mixora.diagnostics.measure import inspect, load_by_group
from mixora.diagnostics.report import RunRecord, write_report
from mixora.errors import ConfigError
from mixora.evaluate import Evaluation, Examples, evaluate
from mixora.folders import check_folder
from mixora.loading import from_pretrained
from mixora.plan import Plan
from mixora.serving import served_by
from mixora.stages import count
from mixora.training.checkpoints import find_checkpoint, read_state, remove_checkpoints, resumable
from mixora.training.interruption import Interruption
from mixora.training.material import Material, batches_of, make_examples, read_material, sample_batches
from mixora.training.progress import Progress, StepProgress
from mixora.training.run_config import RunConfig
from mixora.training.run_folder import CHECKPOINTS, open_folder, paths_read, write_settings
from mixora.training.trainers import Trainer
from mixora.tuner import MixoraConfig, allocate, plan

ROWS_PER_GROUP = 8


def build(material: Material, encoded: Encoded, config: RunConfig, progress: Progress) -> tuple[MixoraConfig, Plan]:
    """The adapter's configuration, its budget allocated, and its plan on the base."""
    adapter = config.adapter.build(task_type=TASK_TYPES[material.task])
    with progress.task(f"allocating, {adapter.method.allocator.kind}") as advance:
        adapter = allocate(material.model, adapter, sample_batches(material, encoded, config), advance)
    return adapter, plan(material.model, adapter)


def fit(config: RunConfig, progress: Progress, overwrite: bool = False, resume: bool = False) -> RunRecord:
    """Run `config` from data to report; writes settings, adapter, report and record below `config.out`.

    With `overwrite` an earlier run's results there are replaced, once the data, the model and all settings have proved
    to fit. With `resume` the run that was interrupted there goes on from its newest checkpoint. Returns the record that
    the report was made from. Raises `StoppedError` after a signal, once a checkpoint is written.
    """
    started = time.perf_counter()
    checkpoint = find_checkpoint(Path(config.out)) if resume else None
    if not resume:
        check_folder(config.out, overwrite, paths_read(config))
    material, encoded = _read(config, progress)
    adapter, table = build(material, encoded, config, progress)
    _show_plan(table, progress)
    examples = make_examples(material, config)
    torch.manual_seed(config.train.seed)
    model = get_peft_model(material.model, adapter)
    before = measure(model, examples, config, progress, "before")
    make_arguments(config)  # a mistake there must cost no earlier results
    out = Path(config.out) if resume else open_folder(config, overwrite)
    write_settings(config)
    with resumable(out):
        trainer = make_trainer(model, material, encoded, config)
        train(trainer, checkpoint, progress)
        after = measure(model, examples, config, progress, "after")
        seen = _describe_model(model, table, examples, config, progress)
        reloaded = _read_back(model, material, examples, config, progress)
        record = RunRecord(
            **_describe_run(config, adapter),
            **seen,
            before={**before.metrics, "rows": len(examples.rows)},
            after={**after.metrics, "rows": len(examples.rows)},
            reloaded=dict(reloaded.metrics),
            history=_history(trainer),
            generations=_generations(examples, before, after, config.evaluate.generations),
            environment=_environment(config, time.perf_counter() - started),
            notes=[*table.notes, *_truncation(encoded)],
        )
        with progress.task("writing the report"):
            write_report(record, out)
    if not config.train.keep_checkpoints:
        remove_checkpoints(out)
    return record


def _read(config: RunConfig, progress: Progress) -> tuple[Material, Encoded]:
    progress.say(f"reading {config.data.source} and {config.model.base}")
    with progress.task("reading"):
        material = read_material(config)
    assert material.train_rows is not None
    with progress.task("encoding, rows") as advance:
        encoded = encode(
            material.train_rows, material.tokenizer, config.data, model_kind=material.kind, advance=advance
        )
    return material, encoded


def train(trainer: Trainer, checkpoint: Path | None, progress: Progress) -> None:
    """Train, from `checkpoint` on if there is one; `KeyboardInterrupt` after a signal, with a checkpoint."""
    state = None if checkpoint is None else read_state(checkpoint)
    if state and state.global_step >= state.max_steps:
        # the trainer would make one more step
        trainer.model.load_adapter(str(checkpoint), trainer.model.active_adapter, is_trainable=True)
        trainer.state = state
        return
    with progress.task("training") as advance, Interruption() as interruption:
        trainer.add_callback(StepProgress(advance))
        trainer.add_callback(interruption)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if interruption.requested:
        raise KeyboardInterrupt


def _read_back(
    model: PeftModel, material: Material, examples: Examples, config: RunConfig, progress: Progress
) -> Evaluation:
    """Save the adapter, and measure what is read from there; `model` is used up."""
    folder = Path(config.out) / "adapter"
    save(model, material.tokenizer, folder)
    progress.say(f"saved {folder}; reading it back")
    return measure(from_pretrained(model.unload(), folder), examples, config, progress, "read back")


def _show_plan(table: Plan, progress: Progress) -> None:
    progress.show(table.table())
    for note in table.notes:
        progress.say(f"note: {note}")


def _describe_run(config: RunConfig, adapter: MixoraConfig) -> dict[str, Any]:
    return {
        "title": config.title or f"{adapter.recipe} on {Path(config.data.source).name}",
        "recipe": str(adapter.recipe),
        "base": config.model.base,
        "data": config.data.source,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["mixora", *sys.argv[1:]]),
        "next_command": f"mixora train --recipe {adapter.recipe} --model YOUR_MODEL --data YOUR_DATA --out runs/yours",
    }


def _describe_model(
    model: PeftModel, table: Plan, examples: Examples, config: RunConfig, progress: Progress
) -> dict[str, Any]:
    """Plan, parameters, and what the trained routers do with the held-out rows."""
    trainable, total = model.get_nb_trainable_parameters()
    outside = trainable - table.parameters  # a new classification head
    columns = ("path", "experts_per_token", "entropy", "dropped_share", "dead_experts", "load")
    with progress.task("inspecting, batches") as advance:
        sites = inspect(model, count(batches_of(examples, config), advance))
    routed = [site for site in sites if site["num_experts"] > 1]
    return {
        "plan": table.rows(full=True),
        "parameters": {"total": total, "trainable": trainable, "active": table.active_parameters + outside},
        "routing": [{name: site[name] for name in columns} for site in routed],
        "load": _load_by_group(model, examples, config),
    }


def make_arguments(config: RunConfig) -> TrainingArguments:
    """The trainer's arguments as `config` says; `ConfigError` for those that transformers refuses."""
    settings = config.train
    defaults: dict[str, Any] = {
        "output_dir": str(Path(config.out) / CHECKPOINTS),
        "max_steps": settings.steps or -1,
        "num_train_epochs": settings.epochs,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "seed": settings.seed,
        "logging_steps": settings.log_every,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 1,
        "save_total_limit": None if settings.keep_checkpoints else 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
    }
    _check_types(settings.arguments)
    try:
        arguments = TrainingArguments(**{**defaults, **settings.arguments})
    except Exception as error:
        # each argument has a check of its own
        raise ConfigError(f"train.arguments: {error}") from None
    if arguments.eval_strategy != "no":
        raise ConfigError(
            f"train.arguments.eval_strategy: got {arguments.eval_strategy.value!r}; valid: 'no', "
            "since a run is evaluated before and after training"
        )
    return arguments


def _check_types(arguments: Mapping[str, Any]) -> None:
    """`ConfigError` for text in place of a number, which `TrainingArguments` would take and fail on later."""
    for field in fields(TrainingArguments):
        given = arguments.get(field.name)
        if isinstance(given, str) and isinstance(field.default, int | float):
            raise ConfigError(f"train.arguments.{field.name}: got {given!r}; valid: a number, such as {field.default}")


def make_trainer(model: PeftModel, material: Material, encoded: Encoded, config: RunConfig) -> Trainer:
    """A `mixora.Trainer` set up as `config` says; `ConfigError` for arguments that transformers refuses."""
    arguments = make_arguments(config)
    # embeddings are never changed here, and looking for it would ask the hub for the base at each checkpoint
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)  # type: ignore[method-assign]
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded.dataset,
        data_collator=material.collator(),
        fused_loss=config.train.fused_loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def measure(model: Any, examples: Examples, config: RunConfig, progress: Progress, when: str) -> Evaluation:
    """The metrics of `model` on the held-out rows."""
    settings = config.evaluate
    with progress.task(f"evaluating, {when}") as advance, served_by(model, settings.served_by):
        return evaluate(model, examples, settings, advance)


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and the tokenizer."""
    # embeddings are never changed here, and looking for it would ask the hub for the base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))


def _load_by_group(model: Any, examples: Examples, config: RunConfig) -> dict[str, Any] | None:
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(examples.rows):
        if config.data.group_by in row:
            groups.setdefault(str(row[config.data.group_by]), []).append(number)
    if not groups:
        return None
    batches = {name: batches_of(examples, config, rows[:ROWS_PER_GROUP]) for name, rows in sorted(groups.items())}
    load = load_by_group(model, batches)
    return load if load["sites"] else None


def _history(trainer: Trainer) -> list[dict[str, float]]:
    """The task's own loss and each auxiliary term, by step."""
    left_out = ("epoch", "learning_rate", "grad_norm", "auxiliary_loss")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [
        {
            **{key: value for key, value in line.items() if key not in left_out},
            "loss": line["loss"] - line.get("auxiliary_loss", 0.0),
        }
        for line in lines
    ]


def _generations(examples: Examples, before: Evaluation, after: Evaluation, count: int) -> list[dict[str, str]]:
    if examples.form not in ("completion", "messages"):
        return []
    said = []
    for row, first, last in list(zip(examples.rows, before.predictions, after.predictions, strict=True))[:count]:
        messages = row.get("messages", [{}, {}])
        prompt, expected = (
            row.get("prompt", messages[-2].get("content")),
            row.get("completion", messages[-1].get("content")),
        )
        said.append({"prompt": str(prompt), "expected": str(expected), "before": str(first), "after": str(last)})
    return said


def _environment(config: RunConfig, seconds: float) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = ("mixora", "torch", "transformers", "peft")
    return {
        **{name: version(name) for name in packages},
        "device": device,
        "dtype": config.model.dtype,
        "seed": config.train.seed,
        "minutes": round(seconds / 60, 2),
    }


def _truncation(encoded: Encoded) -> list[str]:
    return (
        [f"{encoded.truncated} training rows were longer than max_length and lost tokens."] if encoded.truncated else []
    )
