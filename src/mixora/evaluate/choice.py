"""Multiple choice by the likelihood that the model gives each answer."""

from collections.abc import Sequence
from typing import Any

from mixora.display.stages import Advance
from mixora.errors import DataError
from mixora.evaluate.perplexity import IGNORED, Collate, log_likelihoods

Ids = Sequence[int]


def choose(
    model: Any,
    prompts: Sequence[Ids],
    choices: Sequence[Sequence[Ids]],
    texts: Sequence[Sequence[str]],
    collator: Collate,
    batch_size: int,
    advance: Advance | None = None,
) -> tuple[list[int], list[int]]:
    """The likeliest choice of each row: by summed log-probability, and by that sum per character of the choice.

    Dividing by characters rather than tokens makes models with unlike tokenizers comparable.

    Args:
        prompts: token ids of each row's prompt.
        choices: token ids of each row's choices as they follow the prompt.
        texts: the choices as text.
        batch_size: choices (not rows) per batch.
        advance: counts choices too.

    Returns:
        Two lists of indices from 0, one index per row; the first of equals wins.

    Raises:
        DataError: no rows, or a choice without tokens.
    """
    empty = [number for number, row in enumerate(choices, 1) if not all(map(len, row))]
    if empty:
        raise DataError(f"row {empty[0]} has a choice without tokens")
    join = _target if model.config.is_encoder_decoder else _continuation
    rows = [join(prompt, ids) for prompt, row in zip(prompts, choices, strict=True) for ids in row]
    likelihoods = iter(log_likelihoods(model, rows, collator, batch_size, advance))
    plain, normalised = [], []
    for row in texts:
        sums = [next(likelihoods) for _ in row]
        plain.append(_best(sums))
        normalised.append(_best([total / len(text) for total, text in zip(sums, row, strict=True)]))
    return plain, normalised


def _continuation(prompt: Ids, ids: Ids) -> dict[str, list[int]]:
    return {"input_ids": [*prompt, *ids], "labels": [*[IGNORED] * len(prompt), *ids]}


def _target(prompt: Ids, ids: Ids) -> dict[str, list[int]]:
    return {"input_ids": list(prompt), "labels": list(ids)}


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
