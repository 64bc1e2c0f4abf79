"""Which metrics each form of rows has, and the one call that measures them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from mixora.config import Strict, Whole, did_you_mean
from mixora.display.stages import Advance
from mixora.errors import ConfigError, DataError
from mixora.evaluate.choice import choose
from mixora.evaluate.classification import classification_scores, predict, regression_scores
from mixora.evaluate.generation import generate
from mixora.evaluate.perplexity import Collate, token_loss
from mixora.evaluate.scores import ANSWER_MARK, SCORES, parse_call

LOSSES = ("loss", "perplexity")
_LABELLED = ("accuracy", "f1", "mcc", "pearson", "spearman")

METRICS: Mapping[str, tuple[str, ...]] = {
    "completion": (*LOSSES, *SCORES),
    "messages": (*LOSSES, *SCORES),
    "text": LOSSES,
    "classification": _LABELLED,
    "pair": _LABELLED,
    "choice": ("accuracy", "accuracy_norm", *LOSSES),
}
"""Metrics of each form. Which of them make sense for the rows at hand is settled by `default_metrics`."""

Prediction = str | int | float


class EvaluationConfig(Strict):
    """What to measure.

    batch_size: rows (for multiple choice: choices) per batch. max_new_tokens: longest answer. limit: first rows only.
    metrics: names from `METRICS`; those of `default_metrics` when not given.
    """

    batch_size: Whole = 8
    max_new_tokens: Whole = 64
    limit: Whole | None = None
    metrics: tuple[str, ...] | None = None


class Formed(Protocol):
    """Rows of one form: `Examples`, or such as no model has read yet."""

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """The rows as dicts."""

    @property
    def form(self) -> str:
        """A key of `METRICS`."""


@dataclass(frozen=True)
class Examples:
    """Rows to evaluate on, in the shapes that the metrics need; all sequences run over the same rows.

    Attributes:
        rows: the rows as dicts.
        form: a key of `METRICS`.
        tokenizer: decodes generated text.
        collator: makes batches of encoded rows.
        dataset: encoded rows with `select`, not packed; for loss, perplexity, and classes or numbers.
        prompts: token ids of each prompt; for generation and multiple choice.
        choices: token ids of each row's choices; for multiple choice.
    """

    rows: Sequence[Mapping[str, Any]]
    form: str
    tokenizer: PreTrainedTokenizerBase
    collator: Collate
    dataset: Any = None
    prompts: Sequence[Sequence[int]] | None = None
    choices: Sequence[Sequence[Sequence[int]]] | None = None

    def first(self, count: int) -> "Examples":
        """The first `count` rows."""
        return replace(
            self,
            rows=self.rows[:count],
            dataset=None if self.dataset is None else self.dataset.select(range(min(count, len(self.dataset)))),
            prompts=None if self.prompts is None else self.prompts[:count],
            choices=None if self.choices is None else self.choices[:count],
        )


@dataclass(frozen=True)
class Evaluation:
    """Metrics by name, and what the model said for each row: a text, a class, a number, or the index of a choice.

    There are no predictions where only loss and perplexity were measured.
    """

    metrics: dict[str, float]
    predictions: tuple[Prediction, ...]


def evaluate(model: Any, examples: Examples, config: EvaluationConfig, advance: Advance | None = None) -> Evaluation:
    """Measure `model` on `examples`.

    Args:
        model: a model whose head suits the form: sequence classification for labelled rows, else language modelling.
        examples: see `Examples`.
        config: see `EvaluationConfig`.
        advance: told the rows done and the rows in all after each batch, anew for each pass (loss, then answers).

    Raises:
        ConfigError: a metric that the form or its rows do not have.
        DataError: a part of `examples` that the metrics need is missing or has another length.
    """
    if examples.form not in METRICS:
        raise ConfigError(f"form: got {examples.form!r}{did_you_mean(examples.form, METRICS)}")
    _check_lengths(examples)
    if config.limit is not None:
        examples = examples.first(config.limit)
    wanted = choose_metrics(examples, config)
    measured: dict[str, float] = {}
    if set(wanted) & set(LOSSES):
        dataset = _needed(examples, "dataset")
        measured |= token_loss(model, dataset, examples.collator, config.batch_size, advance)
    predictions: Sequence[Prediction] = ()
    if set(wanted) - set(LOSSES):
        answers, predictions = _PASSES[examples.form](model, examples, config, wanted, advance)
        measured |= answers
    return Evaluation({name: measured[name] for name in wanted}, tuple(predictions))


def default_metrics(examples: Formed) -> tuple[str, ...]:
    """Metrics that make sense for these rows.

    Answers that all look like calls, `intent(slot=value; ...)`, get intents and slots; worked ones, which all mark
    their final answer by `####`, its accuracy; others BLEU and ROUGE-L. Float labels get correlations, other labels
    accuracy, F1 and Matthews correlation.
    """
    if examples.form in ("completion", "messages"):
        return (*LOSSES, "exact_match", *_scores_of([text for valid in _references(examples) for text in valid]))
    if METRICS[examples.form] == _LABELLED:
        return _LABELLED[3:] if _is_regression(examples) else _LABELLED[:3]
    return METRICS[examples.form][:2]


def _scores_of(answers: Sequence[str]) -> tuple[str, ...]:
    if all(map(parse_call, answers)):
        return ("intent_accuracy", "slot_f1")
    return ("answer_accuracy",) if all(ANSWER_MARK in text for text in answers) else ("bleu", "rouge_l")


def choose_metrics(examples: Formed, config: EvaluationConfig) -> tuple[str, ...]:
    """The metrics that `evaluate` measures; `ConfigError` for one that the form or its rows do not have."""
    if config.metrics is None:
        return default_metrics(examples)
    valid = METRICS[examples.form]
    if valid == _LABELLED:
        valid = default_metrics(examples)
    for name in config.metrics:
        if name not in valid:
            raise ConfigError(f"metrics: got {name!r} for {examples.form!r} rows{did_you_mean(name, valid)}")
    if not config.metrics:
        raise ConfigError(f"metrics: got none; valid for {examples.form!r} rows: {', '.join(valid)}")
    return config.metrics


def _check_lengths(examples: Examples) -> None:
    if not len(examples.rows):
        raise DataError("there are no rows to evaluate")
    for name in ("dataset", "prompts", "choices"):
        part = getattr(examples, name)
        if part is not None and len(part) != len(examples.rows):
            raise DataError(f"{name}: got {len(part)} for {len(examples.rows)} rows; valid: one each, not packed")


def _needed(examples: Examples, name: str) -> Any:
    part = getattr(examples, name)
    if part is None:
        raise DataError(f"{name}: is missing, but the metrics asked for {examples.form!r} rows need it")
    return part


def _is_regression(examples: Formed) -> bool:
    return isinstance(examples.rows[0]["label"], float)


def _references(examples: Formed) -> list[list[str]]:
    if examples.form == "messages":
        return [[row["messages"][-1]["content"]] for row in examples.rows]
    return [list(row.get("references") or [row["completion"]]) for row in examples.rows]


Pass = Callable[
    [Any, Examples, EvaluationConfig, tuple[str, ...], Advance | None],
    tuple[dict[str, float], Sequence[Prediction]],
]


def _generate(
    model: Any, examples: Examples, config: EvaluationConfig, wanted: tuple[str, ...], advance: Advance | None
) -> tuple[dict[str, float], Sequence[Prediction]]:
    texts = generate(
        model,
        examples.tokenizer,
        _needed(examples, "prompts"),
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        advance=advance,
    )
    references = _references(examples)
    return {name: SCORES[name](texts, references) for name in wanted if name in SCORES}, texts


def _predict(
    model: Any, examples: Examples, config: EvaluationConfig, wanted: tuple[str, ...], advance: Advance | None
) -> tuple[dict[str, float], Sequence[Prediction]]:
    predictions: Any = predict(model, _needed(examples, "dataset"), examples.collator, config.batch_size, advance)
    labels = [row["label"] for row in examples.rows]
    if _is_regression(examples):
        return regression_scores(predictions, labels), predictions
    return classification_scores(predictions, labels, model.config.num_labels), predictions


def _choose(
    model: Any, examples: Examples, config: EvaluationConfig, wanted: tuple[str, ...], advance: Advance | None
) -> tuple[dict[str, float], Sequence[Prediction]]:
    prompts, choices = _needed(examples, "prompts"), _needed(examples, "choices")
    texts = [row["choices"] for row in examples.rows]
    plain, normalised = choose(model, prompts, choices, texts, examples.collator, config.batch_size, advance)
    answers = [row["answer"] for row in examples.rows]
    return {"accuracy": _share(plain, answers), "accuracy_norm": _share(normalised, answers)}, plain


def _share(chosen: list[int], answers: list[int]) -> float:
    return sum(c == a for c, a in zip(chosen, answers, strict=True)) / len(answers)


_PASSES: Mapping[str, Pass] = {
    "completion": _generate,
    "messages": _generate,
    "classification": _predict,
    "pair": _predict,
    "choice": _choose,
}
