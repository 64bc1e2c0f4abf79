"""How good generated texts are, each against one or several references."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal

import sacrebleu
from rouge_score.rouge_scorer import RougeScorer

from mixora.errors import DataError

References = Sequence[Sequence[str]]
Slots = Counter[tuple[str, str]]

ANSWER_MARK = "####"
"""Stands before the final answer of a worked one, as in GSM8K (Cobbe et al. 2021, section 2)."""

_CALL = re.compile(r"([^\s()][^()]*)\((.*)\)", re.DOTALL)
_NUMBER = re.compile(r"(?<![\w.])-?\$?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?<=[0-9])")


def parse_call(text: str) -> tuple[str, Slots] | None:
    """`"travel(from=corby; day=thursday)"` as intent and `name=value` pairs; `None` for any other text."""
    match = _CALL.fullmatch(text.strip())
    if match is None:
        return None
    slots: Slots = Counter()
    for pair in match[2].split(";") if match[2].strip() else []:
        name, equals, value = (part.strip() for part in pair.partition("="))
        if not (name and equals and value):
            return None
        slots[name, value] += 1
    return match[1].strip(), slots


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Share of predictions that equal one of their references, runs of white space counting as one space."""
    _check_pairs(predictions, references)
    hits = sum(_plain(p) in map(_plain, valid) for p, valid in zip(predictions, references, strict=True))
    return hits / len(predictions)


def _plain(text: str) -> str:
    return " ".join(text.split())


def intent_accuracy(predictions: Sequence[str], references: References) -> float:
    """Share of predictions whose text before the first bracket equals a reference's; no bracket is no intent."""
    _check_pairs(predictions, references)
    hits = 0
    for prediction, valid in zip(predictions, references, strict=True):
        intent = _intent(prediction)
        hits += intent is not None and intent in map(_intent, valid)
    return hits / len(predictions)


def _intent(text: str) -> str | None:
    name, bracket, _ = text.partition("(")
    return name.strip() if bracket else None


def slot_f1(predictions: Sequence[str], references: References) -> float:
    """F1 over all `name=value` pairs of all rows (micro); a malformed prediction has no pairs.

    Of several references the one that gives the row the best F1 counts. 1.0 where neither side has a pair.
    """
    _check_pairs(predictions, references)
    both = predicted = wanted = 0
    for prediction, valid in zip(predictions, references, strict=True):
        slots = _slots(prediction)
        best = max((_slots(reference) for reference in valid), key=lambda r: _f1((slots & r).total(), slots, r))
        both += (slots & best).total()
        predicted += slots.total()
        wanted += best.total()
    return 2 * both / (predicted + wanted) if predicted + wanted else 1.0


def _slots(text: str) -> Slots:
    call = parse_call(text)
    return call[1] if call else Counter()


def _f1(both: int, predicted: Slots, wanted: Slots) -> float:
    size = predicted.total() + wanted.total()
    return 2 * both / size if size else 1.0


def answer_accuracy(predictions: Sequence[str], references: References) -> float:
    """Share of worked answers that come to the final answer of one of their references.

    It stands on the line behind the last `####`: the first number there, or the whole line where it has none. Of a text
    without that mark it is the last number. Numbers are compared by value, `$1,200` and `1200.0` being the same.
    """
    _check_pairs(predictions, references)
    hits = 0
    for prediction, valid in zip(predictions, references, strict=True):
        answer = read_answer(prediction)
        hits += answer is not None and answer in map(read_answer, valid)
    return hits / len(predictions)


def read_answer(text: str) -> Decimal | str | None:
    """The final answer of a worked one (see `answer_accuracy`); `None` for a text that comes to none."""
    _, mark, marked = text.rpartition(ANSWER_MARK)
    line = _plain(marked.strip().partition("\n")[0]) if mark else ""
    numbers = _NUMBER.findall(line if mark else text)
    if not numbers:
        return line or None
    return Decimal(numbers[0 if mark else -1].replace(",", "").replace("$", ""))


def bleu(predictions: Sequence[str], references: References) -> float:
    """Corpus BLEU of sacrebleu with its default tokenizer, 0 to 100; rows may have unlike numbers of references."""
    _check_pairs(predictions, references)
    most = max(map(len, references))
    streams = [[valid[n] if n < len(valid) else None for valid in references] for n in range(most)]
    return float(sacrebleu.corpus_bleu(list(predictions), streams).score)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Mean ROUGE-L F-measure, 0 to 1, with each row's best reference.

    The metric's own tokenizer knows Latin letters and digits only: texts in other scripts score 0.
    """
    _check_pairs(predictions, references)
    scorer = RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in valid)
        for prediction, valid in zip(predictions, references, strict=True)
    ]
    return sum(best) / len(best)


def _check_pairs(predictions: Sequence[str], references: References) -> None:
    if not predictions or len(predictions) != len(references):
        raise DataError(f"got {len(predictions)} predictions and {len(references)} rows of references; valid: one each")
    bare = [number for number, valid in enumerate(references, 1) if not valid]
    if bare:
        raise DataError(f"row {bare[0]} has no reference; valid: one or more")


SCORES: Mapping[str, Callable[[Sequence[str], References], float]] = {
    "exact_match": exact_match,
    "intent_accuracy": intent_accuracy,
    "slot_f1": slot_f1,
    "answer_accuracy": answer_accuracy,
    "bleu": bleu,
    "rouge_l": rouge_l,
}
