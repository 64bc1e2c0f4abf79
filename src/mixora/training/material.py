"""A base model with the rows to train and evaluate it on."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from mixora.bases import Task, load_base, read_base_config, read_tokenizer, sketch_base
from mixora.data import (
    FORMS,
    Collator,
    Encoded,
    ModelKind,
    Rows,
    encode,
    read_rows,
    render_choices,
    render_prompt,
    splits_of,
)
from mixora.errors import ConfigError, DataError
from mixora.evaluate import Examples
from mixora.training.run_config import RunConfig


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


def read_material(config: RunConfig, to_train: bool = True, with_weights: bool = True) -> Material:
    """Load what `config` names; `DataError`, `ModelError` or `ConfigError` where the parts do not fit.

    Without weights, the model stands on the meta device.
    """
    train_rows, evaluation_rows = _read_splits(config, to_train)
    rows = train_rows or evaluation_rows
    is_labelled = FORMS[rows.form].labelled
    base, dtype = config.model.base, config.model.dtype
    base_config = read_base_config(base)
    task = _choose_task(config, is_labelled, bool(base_config.is_encoder_decoder))
    outputs = len(rows.labels or (0,)) if task == "sequence-classification" else None
    if with_weights:
        model, tokenizer = load_base(base, task=task, num_labels=outputs, dtype=dtype)
    else:
        model, tokenizer = sketch_base(base, task=task, dtype=dtype), read_tokenizer(base)
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
    rows, encoding = (
        material.evaluation_rows,
        config.data.model_copy(update={"packing": False, "train_on": "completion"}),
    )
    if config.evaluate.limit is not None:
        rows = _first(rows, config.evaluate.limit)
    common: dict[str, Any] = {"model_kind": material.kind}
    has_prompt = rows.form in ("completion", "messages", "choice")
    prompts = (
        [render_prompt(row, rows.form, material.tokenizer, encoding, **common) for row in rows] if has_prompt else None
    )
    is_choice = rows.form == "choice"
    choices = [render_choices(row, material.tokenizer, encoding, **common) for row in rows] if is_choice else None
    dataset = encode(rows, material.tokenizer, encoding, **common).dataset
    return Examples(list(rows), rows.form, material.tokenizer, material.collator(), dataset, prompts, choices)


def sample_batches(material: Material, encoded: Encoded, config: RunConfig) -> Iterator[Mapping[str, torch.Tensor]]:
    """The training rows in batches, in an order that the seed draws, for allocators that look at data."""
    rows = list(range(len(encoded.dataset)))
    random.Random(config.train.seed).shuffle(rows)
    collator, size = material.collator(), config.train.batch_size
    for start in range(0, len(rows), size):
        yield collator([encoded.dataset[row] for row in rows[start : start + size]])


def batches_of(
    examples: Examples, config: RunConfig, rows: Sequence[int] | None = None
) -> list[Mapping[str, torch.Tensor]]:
    """Batches of the examples for routing reports: the given rows, or the first 64."""
    chosen = list(rows if rows is not None else range(min(len(examples.rows), 64)))
    size = config.evaluate.batch_size
    parts = [chosen[n : n + size] for n in range(0, len(chosen), size)]
    return [examples.collator([examples.dataset[row] for row in part]) for part in parts]
