"""The row forms: which fields each needs, how a row is checked, how the form is told from the fields."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mixora.config import did_you_mean
from mixora.errors import DataError

Row = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Form:
    """One way a row may look: the fields it needs and what is wrong with a row that has them (`None`: nothing)."""

    required: tuple[str, ...]
    check: Callable[[Row], str | None]

    @property
    def labelled(self) -> bool:
        """True where rows carry a class or a number to predict instead of text."""
        return "label" in self.required


def _not_text(row: Row, *names: str) -> str | None:
    for name in names:
        if not isinstance(row[name], str):
            return f"{name!r} is {_kind(row[name])}; valid: text"
        if not row[name].strip():
            return f"{name!r} is empty"
    return None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "true or false", type(None): "null", str: "text"}
    return names.get(type(value), f"the number {value}" if isinstance(value, int | float) else type(value).__name__)


def _check_completion(row: Row) -> str | None:
    references = row.get("references")
    if references is not None:
        texts = isinstance(references, list) and all(isinstance(r, str) and r.strip() for r in references)
        if not texts or not references:
            return "'references' is not a list of texts with at least one member"
    return _not_text(row, "prompt", "completion")


def _check_messages(row: Row) -> str | None:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        return f"'messages' is {_kind(messages)}; valid: a list of at least two messages"
    for place, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f"message {place} is not an object with 'role' and 'content'"
        if message["role"] not in ROLES:
            return f"message {place} has the role {message['role']!r}; valid: {', '.join(ROLES)}"
        problem = _not_text(message, "content")
        if problem:
            return f"message {place}: {problem}"
    if messages[0]["role"] == "assistant" or messages[-1]["role"] != "assistant":
        return "the messages do not start with a prompt and end with the assistant's answer"
    return None


def _check_label(row: Row) -> str | None:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return f"'label' is {_kind(label)}; valid: a class name, a class number or a float"
    if isinstance(label, str) and not label.strip():
        return "'label' is empty"
    if isinstance(label, float) and not math.isfinite(label):
        return f"'label' is {label}; valid: a finite number"
    return None


def _check_choice(row: Row) -> str | None:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) < 2:
        return "'choices' is not a list of at least two texts"
    if not all(isinstance(c, str) and c.strip() for c in choices):
        return "'choices' has a member that is empty or not text"
    if isinstance(answer, bool) or not isinstance(answer, int):
        return f"'answer' is {_kind(answer)}; valid: the index of the right choice, from 0"
    if not 0 <= answer < len(choices):
        return f"'answer' is {answer}; valid: 0 to {len(choices) - 1}"
    # Public sets repeat wrong choices now and then, which harms nothing; a repeated right one has two answers.
    if choices.count(choices[answer]) > 1:
        return f"the right choice {choices[answer]!r} is duplicated, so 'answer' is not the only right index"
    return _not_text(row, "question", *(["context"] if row.get("context") else []))


FORMS: Mapping[str, Form] = {
    "completion": Form(("prompt", "completion"), _check_completion),
    "messages": Form(("messages",), _check_messages),
    "text": Form(("text",), lambda row: _not_text(row, "text")),
    "classification": Form(("text", "label"), lambda row: _not_text(row, "text") or _check_label(row)),
    "pair": Form(("text", "text_pair", "label"), lambda row: _not_text(row, "text", "text_pair") or _check_label(row)),
    "choice": Form(("question", "choices", "answer"), _check_choice),
}


def form_named(name: str) -> Form:
    """The entry of `FORMS`; an unknown name is a `DataError` with a suggestion."""
    if name not in FORMS:
        raise DataError(f"form: got {name!r}{did_you_mean(name, FORMS)}")
    return FORMS[name]


def problem_of(row: Any, form: str) -> str | None:
    """What keeps `row` from being a row of `form`, as a clause for an error message; `None` for a good row."""
    if not isinstance(row, dict):
        return f"is {_kind(row)}; valid: an object with fields"
    entry = form_named(form)
    lacking = [repr(name) for name in entry.required if row.get(name) is None]
    if lacking:
        return f"lacks {' and '.join(lacking)} (a {form!r} row needs {', '.join(entry.required)})"
    return entry.check(row)


def fitting_forms(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Forms whose fields `row` has, without those that another fitting form contains (`pair` hides `text`)."""
    fields = {name for name, value in row.items() if value is not None}
    fits = [name for name, form in FORMS.items() if fields.issuperset(form.required)]
    return tuple(f for f in fits if not any(set(FORMS[f].required) < set(FORMS[g].required) for g in fits))


def detect_form(rows: Iterable[Any], origin: str) -> str:
    """The form that most rows have; rows of another form are left for the caller to report.

    Raises:
        DataError: the fields fit no form, or several.
    """
    dicts = [row for row in rows if isinstance(row, dict)]
    seen = Counter(fitting_forms(row) for row in dicts)
    del seen[()]
    fits = seen.most_common(1)[0][0] if seen else ()
    if len(fits) == 1:
        return fits[0]
    example = next((row for row in dicts if fitting_forms(row) == fits), {})
    fields = ", ".join(map(str, example)) or "none"
    valid = "; ".join(f"{name}: {', '.join(form.required)}" for name, form in FORMS.items())
    if fits:
        raise DataError(f"{origin}: the fields {fields} fit several forms ({', '.join(fits)}); name one with 'form'")
    raise DataError(f"{origin}: the fields {fields} fit no form; valid: {valid}")
