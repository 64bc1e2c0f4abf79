"""The whole way of a run: load, plan, evaluate, train, evaluate again, save, read back, report."""

import shlex
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from transformers import TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.bases import TASK_TYPES
from mixora.diagnostics.checkpoint import history_of
from mixora.diagnostics.examination import examine
from mixora.diagnostics.measure import load_by_group
from mixora.diagnostics.record import RunRecord
from mixora.diagnostics.report import write_report
from mixora.errors import ConfigError
from mixora.evaluate import Evaluation, Examples, evaluate
from mixora.loading import from_pretrained
from mixora.plan import Plan
from mixora.serving import served_by
from mixora.training.costs import describe_costs
from mixora.training.material import (
    Material,
    TrainingSet,
    batches_of,
    batches_of_tasks,
    make_examples,
    make_training_set,
    read_material,
    sample_batches,
)
from mixora.training.progress import Progress, StepProgress
from mixora.training.run_config import RunConfig
from mixora.training.run_folder import check_folder, open_folder
from mixora.training.tasks import average, mixture_table, with_loss
from mixora.training.trainers import Trainer
from mixora.tuner import MixoraConfig, allocate, plan

ROWS_PER_GROUP = 8


def build(material: Material, rows: TrainingSet, config: RunConfig, progress: Progress) -> tuple[MixoraConfig, Plan]:
    """The adapter's configuration, its budget allocated, and its plan on the base."""
    adapter = config.adapter.build(task_type=TASK_TYPES[material.task])
    with progress.task(f"allocating, {adapter.method.allocator.kind}") as advance:
        adapter = allocate(material.model, adapter, sample_batches(material, rows.dataset, config), advance)
    return adapter, plan(material.model, adapter)


def fit(config: RunConfig, progress: Progress, overwrite: bool = False) -> RunRecord:
    """Run `config` from data to report; writes settings, adapter, report and record below `config.out`.

    With `overwrite` an earlier run's results there are replaced, once the data, the model and all settings have proved
    to fit. Returns the record that the report was made from.
    """
    started = time.perf_counter()
    check_folder(Path(config.out), overwrite)
    progress.say(f"reading {config.data.origin} and {config.model.base}")
    material = read_material(config)
    rows = make_training_set(material, config)
    adapter, table = build(material, rows, config, progress)
    _show_plan(table, rows, progress)
    examples = make_examples(material, config)
    torch.manual_seed(config.train.seed)
    model = get_peft_model(material.model, adapter)
    before = measure(model, examples, config, progress, "before")
    trainer = make_trainer(model, material, rows, config, progress)
    out = open_folder(config, overwrite)
    seconds = trainer.train().metrics["train_runtime"]
    after = measure(model, examples, config, progress, "after")
    seen = _describe_model(model, material, table, examples, config)
    save(model, material.tokenizer, out / "adapter")
    progress.say(f"saved {out / 'adapter'}; reading it back")
    reloaded = measure(from_pretrained(model.unload(), out / "adapter"), examples, config, progress, "read back")
    count = sum(len(of_task.rows) for of_task in examples.values())
    record = RunRecord(
        **_describe_run(config, adapter),
        **seen,
        before={**average(before), "rows": count},
        after={**average(after), "rows": count},
        reloaded=dict(average(reloaded)),
        history=history_of(trainer.state.log_history),
        generations=_generations(examples, before, after, config.evaluate.generations),
        environment={
            **_environment(config, time.perf_counter() - started),
            **describe_costs(seconds, trainer.state.num_input_tokens_seen),
        },
        notes=[*table.notes, *_truncation(rows), *filter(None, [trainer.alarm.note])],
        tasks=_describe_tasks(rows, examples, {"before": before, "after": after, "reloaded": reloaded}),
    )
    write_report(record, out)
    return record


def _show_plan(table: Plan, rows: TrainingSet, progress: Progress) -> None:
    progress.show(table.table())
    for note in table.notes:
        progress.say(f"note: {note}")
    if rows.tasks:
        progress.show(mixture_table(rows.tasks))


def _describe_run(config: RunConfig, adapter: MixoraConfig) -> dict[str, Any]:
    return {
        "title": config.title or f"{adapter.recipe} on {', '.join(config.data.by_task())}",
        "recipe": str(adapter.recipe),
        "base": config.model.base,
        "data": config.data.origin,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["mixora", *sys.argv[1:]]),
        "next_command": f"mixora train --recipe {adapter.recipe} --model YOUR_MODEL --data YOUR_DATA --out runs/yours",
    }


def _describe_tasks(
    rows: TrainingSet, examples: Mapping[str, Examples], measured: Mapping[str, Mapping[str, Evaluation]]
) -> dict[str, Any]:
    """What was drawn of each task, and its scores; nothing for a single source."""
    return {
        name: {
            **drawn,
            "held_out": len(examples[name].rows),
            **{when: dict(evaluations[name].metrics) for when, evaluations in measured.items()},
        }
        for name, drawn in rows.tasks.items()
    }


def _describe_model(
    model: PeftModel, material: Material, table: Plan, examples: Mapping[str, Examples], config: RunConfig
) -> dict[str, Any]:
    """Plan, parameters, and what the trained routers do with the held-out rows."""
    trainable, total = model.get_nb_trainable_parameters()
    outside = trainable - table.parameters  # a new classification head
    found = examine(model, batches_of_tasks(examples, config), material.tokenizer)
    return {
        "plan": table.rows(full=True),
        "parameters": {"total": total, "trainable": trainable, "active": table.active_parameters + outside},
        **vars(found),
        "load": _load_by_group(model, examples, config),
    }


def make_trainer(
    model: PeftModel, material: Material, rows: TrainingSet, config: RunConfig, progress: Progress
) -> Trainer:
    """A `mixora.Trainer` set up as `config` says; `ConfigError` for arguments that transformers refuses."""
    settings = config.train
    defaults: dict[str, Any] = {
        "output_dir": config.out,
        "max_steps": settings.steps or -1,
        # what is drawn from tasks is as long as the run and in its order
        "num_train_epochs": 1 if rows.tasks else settings.epochs,
        "train_sampling_strategy": "sequential" if rows.tasks else "random",
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "seed": settings.seed,
        "logging_steps": settings.log_every,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
        # packed rows come without a mask
        "include_num_input_tokens_seen": "all" if config.data.packing else "non_padding",
    }
    try:
        arguments = TrainingArguments(**{**defaults, **settings.arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.arguments: {error}") from None
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows.dataset,
        data_collator=material.collator(),
        callbacks=[StepProgress(progress)],
        fused_loss=settings.fused_loss,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def measure(
    model: Any, examples: Mapping[str, Examples], config: RunConfig, progress: Progress, when: str
) -> dict[str, Evaluation]:
    """The metrics of `model` on the held-out rows of each task."""
    found = {}
    for name, of_task in examples.items():
        settings = config.evaluate if config.data.tasks is None else with_loss(config.evaluate, of_task)
        with progress.task(f"evaluating {name}, {when}") as advance, served_by(model, config.evaluate.served_by):
            found[name] = evaluate(model, of_task, settings, advance)
    return found


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and the tokenizer."""
    # embeddings are never changed here, and looking for it would ask the hub for the base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))


def _load_by_group(model: Any, examples: Mapping[str, Examples], config: RunConfig) -> dict[str, Any] | None:
    field = config.data.group_by or ("domain" if config.data.tasks is None else "task")
    groups: dict[str, list[Mapping[str, torch.Tensor]]] = {}
    for of_task in examples.values():
        numbers: dict[str, list[int]] = {}
        for number, row in enumerate(of_task.rows):
            if field in row:
                numbers.setdefault(str(row[field]), []).append(number)
        for name, rows in numbers.items():
            groups.setdefault(name, []).extend(batches_of(of_task, config, rows[:ROWS_PER_GROUP]))
    if not groups:
        return None
    load = load_by_group(model, dict(sorted(groups.items())))
    return load if load["sites"] else None


def _generations(
    examples: Mapping[str, Examples], before: Mapping[str, Evaluation], after: Mapping[str, Evaluation], count: int
) -> list[dict[str, str]]:
    said = []
    for name, of_task in examples.items():
        if of_task.form not in ("completion", "messages"):
            continue
        answers = zip(of_task.rows, before[name].predictions, after[name].predictions, strict=True)
        for row, first, last in list(answers)[:count]:
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


def _truncation(rows: TrainingSet) -> list[str]:
    return [f"{rows.truncated} training rows were longer than max_length and lost tokens."] if rows.truncated else []
