"""Rows as a `datasets.Dataset` of token ids and labels, for each kind of model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from mixora.data.formats import FORMS
from mixora.data.packing import pack
from mixora.data.prompts import (
    EncodingConfig,
    ModelKind,
    Segment,
    conversation_of,
    cut_left,
    segment_conversation,
    tokenize_prompt,
    tokenize_segments,
    uses_chat,
)
from mixora.data.sources import Rows
from mixora.display.stages import Advance
from mixora.errors import DataError

IGNORED = -100

logger = logging.getLogger("mixora")


@dataclass(frozen=True)
class Encoded:
    """Encoded rows and their counts: `truncated` rows lost tokens, `supervised_tokens` of all `tokens` are targets.

    Without packing, row i of `dataset` is row i of the source. A classification row counts as one supervised token.
    """

    dataset: datasets.Dataset
    truncated: int
    supervised_tokens: int
    tokens: int


@dataclass(frozen=True)
class _Example:
    columns: dict[str, Any]
    truncated: bool


def encode(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    config: EncodingConfig,
    *,
    model_kind: ModelKind,
    advance: Advance | None = None,
) -> Encoded:
    """Encode `rows` for training or for measuring the loss.

    Columns, each a list of int per row unless said otherwise:

    - decoder: `input_ids`, `labels` (-100 where nothing is learned: prompts, and the first token, which nothing
      precedes), and with packing `position_ids`, which restart at 0 at each row of the bin.
    - encoder-decoder: `input_ids` (the prompt), `labels` (the answer, ending with EOS).
    - classification and pair rows: `input_ids`, `token_type_ids` for encoders that use them, `labels` (an int, or a
      float where the rows have no classes).

    A row over `max_length` loses the start of its prompt first (BOS stays, or the last token where there is none),
    then the end of its answer; such rows are counted and logged. Text and classification rows lose their end.
    `advance` is told the rows done and the rows in all.

    Raises:
        DataError: the form does not suit the model, a setting cannot take effect, the tokenizer lacks EOS or a chat
            template, or a row keeps no token to learn from.
    """
    if not rows:
        raise DataError(f"{rows.origin}: has no rows to encode")
    with _named(rows.origin):
        _check_fit(rows.form, tokenizer, config, model_kind)
    examples = list(_examples_of(rows, tokenizer, config, model_kind, advance))
    truncated = sum(example.truncated for example in examples)
    if truncated:
        told = "%s: %d of %d rows are longer than max_length %d and lost tokens"
        logger.warning(told, rows.origin, truncated, len(rows), config.max_length)
    return Encoded(
        dataset=_dataset_of([e.columns for e in examples], config),
        truncated=truncated,
        supervised_tokens=sum(map(_supervised, examples)),
        tokens=sum(_size(example, model_kind) for example in examples),
    )


def _examples_of(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    config: EncodingConfig,
    model_kind: ModelKind,
    advance: Advance | None,
) -> Iterator[_Example]:
    make = _encode_labelled if FORMS[rows.form].labelled else _encode_text
    if model_kind == "encoder-decoder":
        make = _encode_source_and_target
    for number, row in enumerate(rows, 1):
        with _named(f"{rows.origin}, row {number}"):
            example = make(row, rows, tokenizer, config, model_kind)
            if _supervised(example) == 0:
                raise DataError("keeps no token to learn from")
        yield example
        if advance and number % 100 == 0:
            advance(number, len(rows))


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _check_fit(form: str, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, model_kind: ModelKind) -> None:
    labelled = FORMS[form].labelled
    suits = {"decoder": True, "encoder": labelled, "encoder-decoder": not labelled and form != "text"}
    if not suits[model_kind]:
        valid = "classification, pair" if model_kind == "encoder" else "completion, messages, choice"
        raise DataError(f"form: got {form!r} rows for an {model_kind} model; valid: {valid}")
    generative_decoder = model_kind == "decoder" and not labelled
    if config.packing and not generative_decoder:
        raise DataError(f"packing: has no effect on {form!r} rows for an {model_kind} model; valid: false")
    if config.train_on == "all" and not generative_decoder:
        raise DataError(f"train_on: 'all' has no effect on {form!r} rows for an {model_kind} model; valid: completion")
    if config.prompt_format != "auto" and (labelled or form == "text"):
        raise DataError(f"prompt_format: {config.prompt_format!r} has no effect on {form!r} rows; valid: auto")
    if not labelled and tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token, so an answer would have no end; valid: a tokenizer with one")


def _encode_labelled(
    row: dict[str, Any], rows: Rows, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, model_kind: ModelKind
) -> _Example:
    texts = (row["text"], row["text_pair"]) if rows.form == "pair" else (row["text"],)
    whole = tokenizer(*texts, verbose=False)
    truncated = len(whole["input_ids"]) > config.max_length
    if truncated:
        whole = tokenizer(*texts, truncation=True, max_length=config.max_length)
    names = ["input_ids", "token_type_ids"] if model_kind == "encoder" else ["input_ids"]
    columns = {name: whole[name] for name in names if name in whole}
    return _Example({**columns, "labels": row["label"]}, truncated)


def _encode_source_and_target(
    row: dict[str, Any], rows: Rows, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, model_kind: ModelKind
) -> _Example:
    *prompt, answer = conversation_of(row, rows.form, answered=True)
    source = tokenize_prompt(prompt, tokenizer, config, model_kind)
    target = tokenizer(text_target=answer["content"]).input_ids
    if target[-1:] != [tokenizer.eos_token_id]:
        target = [*target, tokenizer.eos_token_id]
    limit = config.max_length
    columns = {"input_ids": cut_left(source, limit, tokenizer), "labels": target[:limit]}
    return _Example(columns, max(len(source), len(target)) > limit)


def _encode_text(
    row: dict[str, Any], rows: Rows, tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, model_kind: ModelKind
) -> _Example:
    if rows.form == "text":
        chat, segments = False, [Segment(row["text"], True)]
    else:
        chat = uses_chat(tokenizer, config)
        segments = segment_conversation(conversation_of(row, rows.form, answered=True), tokenizer, chat)
    ids, answers = tokenize_segments(segments, tokenizer, chat)
    ids, answers = _end_with_eos(ids, answers, tokenizer)
    kept = _kept_places(ids, answers, config.max_length, tokenizer)
    learned = [config.train_on == "all" or answers[place] for place in kept]
    # Nothing precedes the first token, so no model predicts it; in a bin its predecessor is another row.
    learned[0] = False
    labels = [ids[place] if learn else IGNORED for place, learn in zip(kept, learned, strict=True)]
    return _Example({"input_ids": [ids[place] for place in kept], "labels": labels}, len(kept) < len(ids))


def _end_with_eos(
    ids: list[int], answers: list[bool], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[bool]]:
    """Close the last answer with EOS; what a template puts after its own EOS (a newline) is left away."""
    eos = tokenizer.eos_token_id
    last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] == eos and answers[place]), None)
    if last is not None and not tokenizer.decode(ids[last + 1 :]).strip():
        return ids[: last + 1], answers[: last + 1]
    return [*ids, eos], [*answers, True]


def _kept_places(ids: list[int], answers: list[bool], limit: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Which tokens stay: the first prompt loses its start, but one token (BOS if it has one), then the end goes."""
    first = 1 if ids[0] == tokenizer.bos_token_id else 0
    droppable = max(answers.index(True) - 1, 0)
    dropped = min(max(len(ids) - limit, 0), droppable)
    return [*range(first), *range(first + dropped, len(ids))][:limit]


def _supervised(example: _Example) -> int:
    labels = example.columns["labels"]
    return sum(label != IGNORED for label in labels) if isinstance(labels, list) else 1


def _size(example: _Example, model_kind: ModelKind) -> int:
    source = len(example.columns["input_ids"])
    return source + len(example.columns["labels"]) if model_kind == "encoder-decoder" else source


def _dataset_of(examples: list[dict[str, Any]], config: EncodingConfig) -> datasets.Dataset:
    if config.packing:
        bins = pack([len(example["input_ids"]) for example in examples], config.max_length)
        examples = [_join([examples[row] for row in members]) for members in bins]
    return datasets.Dataset.from_dict({name: [e[name] for e in examples] for name in examples[0]})


def _join(examples: list[dict[str, Any]]) -> dict[str, Any]:
    joined = {name: [token for e in examples for token in e[name]] for name in ("input_ids", "labels")}
    return {**joined, "position_ids": [place for e in examples for place in range(len(e["input_ids"]))]}
