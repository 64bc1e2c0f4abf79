"""A base model with the rows to train and evaluate it on."""

import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.bases import Task, count_positions, load_base, name_classes, read_base_config, read_tokenizer, sketch_base
from mixora.data import (
    FORMS,
    Collator,
    Encoded,
    EncodingConfig,
    ModelKind,
    Rows,
    count_rows,
    encode,
    mix,
    render_choices,
    render_prompt,
    share_out,
)
from mixora.display.stages import Advance
from mixora.errors import ConfigError, DataError
from mixora.evaluate import Examples
from mixora.training.processes import count_asked
from mixora.training.rows import Past, TaskRows, evaluated_rows, labels_of, read_tasks
from mixora.training.run_config import DataSection, RunConfig
from mixora.training.tasks import name_metrics

ROUTED_ROWS = 64


@dataclass(frozen=True)
class Material:
    """A base model with the rows of each task to train and evaluate it on; a single source is one task."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    task: Task
    kind: ModelKind
    tasks: Mapping[str, TaskRows]

    def collator(self) -> Collator:
        """Makes batches for this model."""
        return Collator(self.tokenizer, self.kind)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The class names, one for each output of the head; none where it gives a number, None without a head."""
        return labels_of(next(iter(self.tasks.values())).evaluation)

    def train_rows(self) -> dict[str, Rows]:
        """The rows to train on, which must have been asked for."""
        found = {name: rows.train for name, rows in self.tasks.items()}
        return {name: rows for name, rows in found.items() if rows is not None}


@dataclass(frozen=True)
class TrainingSet:
    """Encoded rows to train on, in their order where they are drawn from several tasks.

    `truncated` rows lost tokens. `tasks`, empty for a single source, says of each task how many `rows` (bins, where
    rows are packed) it has, its `share` of the draws, and how many of this set are `drawn` from it.
    """

    dataset: datasets.Dataset
    truncated: int
    tasks: dict[str, dict[str, Any]]


def read_material(
    config: RunConfig, to_train: bool = True, with_weights: bool = True, past: Past | None = None
) -> Material:
    """Load what `config` names; `DataError`, `ModelError` or `ConfigError` where the parts do not fit.

    Without weights, the model stands on the meta device. `past`: the run whose adapter the model is for, if it is
    finished. Rows are then numbered by its classes, and of a source that it did not meet, nothing is held out of what
    is only evaluated.
    """
    tasks, rows = read_tasks(config, to_train, past)
    is_labelled = FORMS[rows.form].labelled
    if past is not None:
        _check_meets(rows, past)
    if to_train:
        name_metrics(config, evaluated_rows(tasks, config))
    base, dtype, attention = config.model.base, config.model.dtype, config.model.attn_implementation
    base_config = read_base_config(base)
    task = _choose_task(config, is_labelled, bool(base_config.is_encoder_decoder))
    outputs = len(rows.labels or (0,)) if task == "sequence-classification" else None
    if with_weights:
        model, tokenizer = load_base(base, task=task, num_labels=outputs, dtype=dtype, attn_implementation=attention)
        name_classes(model, rows.labels or ())
    else:
        model, tokenizer = sketch_base(base, task=task, dtype=dtype), read_tokenizer(base)
    kind: ModelKind = "encoder-decoder" if base_config.is_encoder_decoder else _kind_of(model, task)
    return Material(model, tokenizer, task, kind, tasks)


def _check_meets(rows: Rows, past: Past) -> None:
    """`DataError` for labels where the model of the past run writes, and for texts where it has a head."""
    has_head = past.labels is not None
    if FORMS[rows.form].labelled != has_head:
        does = "tells classes apart, or gives numbers" if has_head else "writes text"
        valid = ", ".join(name for name, form in FORMS.items() if form.labelled == has_head)
        raise DataError(f"{rows.origin}: got {rows.form!r} rows for a run whose model {does}; valid: {valid}")


def read_task(config: RunConfig) -> tuple[Task, dict[str, Rows]]:
    """What a run trains the base for, and the rows of each task that it is evaluated on: read without weights.

    Raises as `read_material` does.
    """
    tasks, rows = read_tasks(config, to_train=True)
    base = read_base_config(config.model.base)
    task = _choose_task(config, FORMS[rows.form].labelled, bool(base.is_encoder_decoder))
    return task, evaluated_rows(tasks, config)


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


def encode_rows(
    material: Material, config: RunConfig, tasks: Mapping[str, Rows], advance: Advance | None = None, **changes: Any
) -> dict[str, Encoded]:
    """Rows of several tasks, encoded by the settings of the run with `changes`; each task is told to `advance`."""
    encoding: EncodingConfig = config.data.model_copy(update=changes)
    # text has no prompt to format, which is no mistake beside tasks that have one
    common: dict[str, Any] = {"model_kind": material.kind, "advance": advance}
    plain = encoding if config.data.tasks is None else encoding.model_copy(update={"prompt_format": "auto"})
    encoded = {
        name: encode(rows, material.tokenizer, plain if rows.form == "text" else encoding, **common)
        for name, rows in tasks.items()
    }
    _check_positions(material, config, encoded)
    return encoded


def _check_positions(material: Material, config: RunConfig, encoded: Mapping[str, Encoded]) -> None:
    """`ConfigError` for rows that are longer than the base's table of positions."""
    most = count_positions(material.model)
    if most is None or config.data.max_length <= most:
        return
    for rows in encoded.values():
        columns = {"input_ids", "labels"} if material.kind == "encoder-decoder" else {"input_ids"}
        longest = max(len(row) for name in columns for row in rows.dataset[name])
        if "position_ids" in rows.dataset.column_names:
            longest = max(max(row) for row in rows.dataset["position_ids"]) + 1
        if longest > most:
            raise ConfigError(
                f"data.max_length: got {config.data.max_length}, and a row has {longest} tokens; "
                f"valid for {config.model.base}: at most {most}"
            )


def make_training_set(material: Material, config: RunConfig, advance: Advance | None = None) -> TrainingSet:
    """What `config` trains on: the rows of a single source as they stand, or as many of several as the run takes."""
    encoded = encode_rows(material, config, material.train_rows(), advance)
    truncated = sum(part.truncated for part in encoded.values())
    parts = {name: part.dataset for name, part in encoded.items()}
    if config.data.tasks is None:
        (dataset,) = parts.values()
        return TrainingSet(dataset, truncated, {})
    settings = _mixing(config.data)
    sizes = {name: len(part) for name, part in parts.items()}
    count = count_rows_of_epoch(config, sizes)
    dataset = mix(parts, **settings, rows=count, seed=config.train.seed)
    shares, drawn = share_out(sizes, **settings), Counter(dataset["task"])
    tasks = {name: {"rows": sizes[name], "share": shares[name], "drawn": drawn[name]} for name in parts}
    return TrainingSet(dataset, truncated, tasks)


def _mixing(data: DataSection) -> dict[str, Any]:
    mixing = data.mixing
    return {
        "weights": data.weights,
        "temperature": None if mixing is None else mixing.temperature,
        "limit": None if mixing is None else mixing.limit,
    }


def count_rows_of_epoch(config: RunConfig, sizes: Mapping[str, int]) -> int:
    """The rows that a trainer sees as one epoch of tasks of these `sizes`: of several, all that the run takes.

    A trainer that takes more begins again.
    """
    train = config.train
    if config.data.tasks is None:
        return sum(sizes.values())
    if train.steps is not None:
        return train.steps * train.batch_size * train.gradient_accumulation * count_asked()
    return math.ceil(train.epochs * sum(count_rows(sizes, _mixing(config.data)["limit"]).values()))


def make_examples(material: Material, config: RunConfig) -> dict[str, Examples]:
    """The held-out rows of each task in the shapes that the metrics need."""
    held_out = evaluated_rows(material.tasks, config)
    encoded = encode_rows(material, config, held_out, packing=False, train_on="completion")
    return {name: _make_examples(rows, encoded[name], material, config) for name, rows in held_out.items()}


def _make_examples(rows: Rows, encoded: Encoded, material: Material, config: RunConfig) -> Examples:
    tokenizer = material.tokenizer
    common: dict[str, Any] = {"model_kind": material.kind}
    has_prompt = rows.form in ("completion", "messages", "choice")
    prompts = [render_prompt(row, rows.form, tokenizer, config.data, **common) for row in rows] if has_prompt else None
    is_choice = rows.form == "choice"
    choices = [render_choices(row, tokenizer, config.data, **common) for row in rows] if is_choice else None
    return Examples(list(rows), rows.form, tokenizer, material.collator(), encoded.dataset, prompts, choices)


def sample_batches(
    material: Material, dataset: datasets.Dataset, config: RunConfig
) -> Iterator[Mapping[str, torch.Tensor]]:
    """Encoded training rows in batches, in an order that the seed draws, for allocators that look at data."""
    rows = list(range(len(dataset)))
    random.Random(config.train.seed).shuffle(rows)
    collator, size = material.collator(), config.train.batch_size
    for start in range(0, len(rows), size):
        yield collator([dataset[row] for row in rows[start : start + size]])


def batches_of(examples: Examples, config: RunConfig, rows: Sequence[int]) -> list[Mapping[str, torch.Tensor]]:
    """Batches of the given rows."""
    size = config.evaluate.batch_size
    parts = [rows[n : n + size] for n in range(0, len(rows), size)]
    return [examples.collator([examples.dataset[row] for row in part]) for part in parts]


def batches_of_tasks(
    tasks: Mapping[str, Examples], config: RunConfig, count: int | None = ROUTED_ROWS
) -> list[Mapping[str, torch.Tensor]]:
    """Batches for routing reports of the first `count` rows (None: all), of several tasks equally many of each."""
    most = None if count is None else max(1, count // len(tasks))
    each = [batches_of(examples, config, range(len(examples.rows))[:most]) for examples in tasks.values()]
    return [batch for of_task in each for batch in of_task]
