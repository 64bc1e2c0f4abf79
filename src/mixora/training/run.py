"""The whole way of a run: load, plan, evaluate, train, evaluate again, save, read back, report."""

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, TaskType, get_peft_model
from transformers import AutoConfig, PreTrainedModel, TrainingArguments
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.bases import Task, load_base, resolve_base
from mixora.data import FORMS, Collator, Encoded, ModelKind, Rows, encode, read_rows, render_choices, render_prompt, splits_of
from mixora.diagnostics.measure import inspect, load_by_group
from mixora.diagnostics.report import RunRecord, write_report
from mixora.errors import ConfigError, DataError
from mixora.evaluate import Evaluation, Examples, evaluate
from mixora.loading import from_pretrained
from mixora.plan import Plan
from mixora.training.progress import Progress, StepProgress
from mixora.training.run_config import RunConfig
from mixora.training.trainers import Trainer
from mixora.tuner import MixoraConfig, plan

_TASK_TYPES: dict[Task, TaskType] = {
    "causal-lm": TaskType.CAUSAL_LM,
    "sequence-classification": TaskType.SEQ_CLS,
    "seq2seq-lm": TaskType.SEQ_2_SEQ_LM,
}
ROWS_PER_GROUP = 8


@dataclass(frozen=True)
class Material:
    """A base model with the rows to train and evaluate it on."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    kind: ModelKind
    train_rows: Rows | None
    evaluation_rows: Rows

    def collator(self) -> Collator:
        """Makes batches for this model."""
        return Collator(self.tokenizer, self.kind)


def read_material(config: RunConfig, to_train: bool = True) -> Material:
    """Load what `config` names; `DataError`, `ModelError` or `ConfigError` where the parts do not fit."""
    train_rows, evaluation_rows = _read_splits(config, to_train)
    rows = train_rows or evaluation_rows
    is_labelled = FORMS[rows.form].labelled
    base_config = AutoConfig.from_pretrained(str(resolve_base(config.model.base)))
    task = _choose_task(config, is_labelled, bool(base_config.is_encoder_decoder))
    outputs = len(rows.labels or (0,)) if task == "sequence-classification" else None
    model, tokenizer = load_base(config.model.base, task=task, num_labels=outputs, dtype=config.model.dtype)
    kind: ModelKind = "encoder-decoder" if base_config.is_encoder_decoder else _kind_of(model, task)
    return Material(model, tokenizer, task, kind, train_rows, evaluation_rows)


def _choose_task(config: RunConfig, is_labelled: bool, is_encoder_decoder: bool) -> Task:
    fitting: Task = "seq2seq-lm" if is_encoder_decoder else "causal-lm"
    fitting = "sequence-classification" if is_labelled else fitting
    if config.model.task not in ("auto", fitting):
        raise ConfigError(f"model.task: got {config.model.task!r}; valid for this base and data: 'auto', {fitting!r}")
    return fitting


def _kind_of(model: PreTrainedModel, task: Task) -> ModelKind:
    """Encoders serve classification only; whatever has a causal class of its own is a decoder."""
    is_encoder = type(model.config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return "encoder" if task == "sequence-classification" and is_encoder else "decoder"


def _read_splits(config: RunConfig, to_train: bool) -> tuple[Rows | None, Rows]:
    data = config.data
    has_split = data.evaluation_split in splits_of(data.source)
    if not has_split and data.evaluation_split != "validation":
        read_rows(data.source, data.evaluation_split)  # raises, and names the splits there are
    train_rows = read_rows(data.source, "train", form=data.form) if to_train or not has_split else None
    if has_split:
        labels = train_rows.labels if train_rows else None
        held_out = read_rows(data.source, data.evaluation_split, form=data.form, labels=labels)
    else:
        assert train_rows is not None
        train_rows, held_out = _hold_out(train_rows)
    if train_rows is not None and data.train_rows is not None:
        train_rows = _first(train_rows, data.train_rows)
    return train_rows if to_train else None, held_out


def _hold_out(rows: Rows) -> tuple[Rows, Rows]:
    """The last tenth of the rows is not trained on."""
    count = max(1, len(rows) // 10)
    if len(rows) < 2:
        raise DataError(f"{rows.origin}: one row cannot be split into training and evaluation; valid: two or more")
    held_out = Rows(rows[len(rows) - count :], rows.form, rows.labels, f"{rows.origin} (last {count} rows)")
    return _first(rows, len(rows) - count), held_out


def _first(rows: Rows, count: int) -> Rows:
    return Rows(rows[:count], rows.form, rows.labels, rows.origin)


def make_examples(material: Material, config: RunConfig) -> Examples:
    """The held-out rows in the shapes that the metrics need."""
    rows, encoding = material.evaluation_rows, config.data.model_copy(update={"packing": False, "train_on": "completion"})
    if config.evaluate.limit is not None:
        rows = _first(rows, config.evaluate.limit)
    common = {"model_kind": material.kind}
    has_prompt = rows.form in ("completion", "messages", "choice")
    prompts = [render_prompt(row, rows.form, material.tokenizer, encoding, **common) for row in rows] if has_prompt else None
    is_choice = rows.form == "choice"
    choices = [render_choices(row, material.tokenizer, encoding, **common) for row in rows] if is_choice else None
    dataset = encode(rows, material.tokenizer, encoding, **common).dataset
    return Examples(list(rows), rows.form, material.tokenizer, material.collator(), dataset, prompts, choices)


def build(material: Material, config: RunConfig) -> tuple[MixoraConfig, Plan]:
    """The adapter's configuration and its plan on the base."""
    adapter = config.adapter.build(task_type=_TASK_TYPES[material.task])
    return adapter, plan(material.model, adapter)


def fit(config: RunConfig, progress: Progress) -> RunRecord:
    """Run `config` from data to report; writes `adapter/`, `report.html` and `record.json` below `config.out`.

    Returns the record that the report was made from.
    """
    started, out = time.perf_counter(), Path(config.out)
    progress.say(f"reading {config.data.source} and {config.model.base}")
    material = read_material(config)
    adapter, table = build(material, config)
    progress.show(table.table())
    for note in table.notes:
        progress.say(f"note: {note}")
    examples = make_examples(material, config)
    assert material.train_rows is not None
    encoded = encode(material.train_rows, material.tokenizer, config.data, model_kind=material.kind)
    torch.manual_seed(config.train.seed)
    model = get_peft_model(material.model, adapter)
    before = measure(model, examples, config, progress, "before")
    trainer = train(model, material, encoded, config, progress)
    after = measure(model, examples, config, progress, "after")
    routing = inspect(model, _batches(examples, config))
    load = _load_by_group(model, examples, config)
    counts = _count(model, table)
    save(model, material.tokenizer, out / "adapter")
    progress.say(f"saved {out / 'adapter'}; reading it back")
    reread = from_pretrained(model.unload(), out / "adapter")
    reloaded = measure(reread, examples, config, progress, "read back")
    record = RunRecord(
        title=config.title or f"{adapter.recipe} on {Path(config.data.source).name}",
        recipe=str(adapter.recipe),
        base=config.model.base,
        data=str(config.data.source),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join(["mixora", *sys.argv[1:]]),
        next_command=f"mixora train --recipe {adapter.recipe} --model YOUR_MODEL --data YOUR_DATA",
        plan=[{**row, "shape": list(map(int, row["shape"].split(" x ")))} for row in table.rows()],
        parameters=counts,
        before={**before.metrics, "rows": len(examples.rows)},
        after={**after.metrics, "rows": len(examples.rows)},
        reloaded=dict(reloaded.metrics),
        history=_history(trainer),
        load=load,
        routing=[{k: site[k] for k in ("path", "entropy", "dropped_share", "dead_experts", "load")} for site in routing],
        generations=_generations(examples, before, after, config.evaluate.generations),
        environment=_environment(config, time.perf_counter() - started),
        notes=[*table.notes, *_truncation(encoded)],
    )
    write_report(record, out)
    return record


def train(model: PeftModel, material: Material, encoded: Encoded, config: RunConfig, progress: Progress) -> Trainer:
    """Train the adapter with `mixora.Trainer`; returns the trainer, whose state holds the history."""
    settings = config.train
    defaults: dict[str, Any] = {
        "output_dir": str(Path(config.out) / "checkpoints"),
        "max_steps": settings.steps or -1,
        "num_train_epochs": settings.epochs,
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
    }
    try:
        arguments = TrainingArguments(**{**defaults, **settings.arguments})
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train.arguments: {error}") from None
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=encoded.dataset,
        data_collator=material.collator(),
        callbacks=[StepProgress(progress)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    return trainer


def measure(model: Any, examples: Examples, config: RunConfig, progress: Progress, when: str) -> Evaluation:
    """The metrics of `model` on the held-out rows."""
    settings = config.evaluate
    with progress.task(f"evaluating, {when}") as advance:
        return evaluate(model, examples, settings, advance)


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and the tokenizer."""
    # embeddings are never changed here, and looking for it would ask the hub for the base
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(str(folder))


def _batches(examples: Examples, config: RunConfig, rows: Sequence[int] | None = None) -> list[Mapping[str, torch.Tensor]]:
    chosen = list(rows if rows is not None else range(min(len(examples.rows), 64)))
    size = config.evaluate.batch_size
    parts = [chosen[n : n + size] for n in range(0, len(chosen), size)]
    return [examples.collator([examples.dataset[row] for row in part]) for part in parts]


def _load_by_group(model: Any, examples: Examples, config: RunConfig) -> dict[str, Any] | None:
    groups: dict[str, list[int]] = {}
    for number, row in enumerate(examples.rows):
        if config.data.group_by in row:
            groups.setdefault(str(row[config.data.group_by]), []).append(number)
    if not groups:
        return None
    batches = {name: _batches(examples, config, rows[:ROWS_PER_GROUP]) for name, rows in sorted(groups.items())}
    load = load_by_group(model, batches)
    return load if load["sites"] else None


def _count(model: PeftModel, table: Plan) -> dict[str, int]:
    trainable, total = model.get_nb_trainable_parameters()
    return {"total": total, "trainable": trainable, "active": trainable - table.parameters + table.active_parameters}


def _history(trainer: Trainer) -> list[dict[str, float]]:
    left_out = ("epoch", "learning_rate", "grad_norm")
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return [{key: value for key, value in line.items() if key not in left_out} for line in lines]


def _generations(examples: Examples, before: Evaluation, after: Evaluation, count: int) -> list[dict[str, str]]:
    if examples.form not in ("completion", "messages"):
        return []
    said = []
    for row, first, last in list(zip(examples.rows, before.predictions, after.predictions, strict=True))[:count]:
        messages = row.get("messages", [{}, {}])
        prompt, expected = row.get("prompt", messages[-2].get("content")), row.get("completion", messages[-1].get("content"))
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
    return [f"{encoded.truncated} training rows were longer than max_length and lost tokens."] if encoded.truncated else []
