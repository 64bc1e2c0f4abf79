"""Classes of labelled rows: their names, and each row's label as a class number or a float."""

from collections.abc import Iterable
from typing import Any

from mixora.config import did_you_mean
from mixora.errors import DataError

MAX_CLASSES = 10_000

Label = str | int | float


def name_classes(labels: Iterable[Label], origin: str) -> tuple[str, ...] | None:
    """Class names for these labels: text sorted, class numbers as "0" to their greatest; `None` for floats.

    Raises:
        DataError: names and numbers are mixed, or a class number is negative or `MAX_CLASSES` and more.
    """
    distinct = set(labels)
    names = sorted(label for label in distinct if isinstance(label, str))
    numbers = [label for label in distinct if not isinstance(label, str)]
    if names and numbers:
        raise DataError(f"{origin}: labels mix names ({names[0]!r}) and numbers ({numbers[0]}); valid: one kind")
    if names:
        return tuple(names)
    if any(isinstance(label, float) for label in numbers):
        return None
    wrong = [label for label in numbers if not 0 <= label < MAX_CLASSES]
    if wrong:
        raise DataError(
            f"{origin}: got the class number {min(wrong)}; valid: 0 to {MAX_CLASSES - 1}, a class name, or a float"
        )
    return tuple(str(number) for number in range(int(max(numbers, default=-1)) + 1))


def number_label(label: Any, classes: tuple[str, ...] | None) -> tuple[int | float, str | None]:
    """`label` as the model's target, and what is wrong with it (`None`: nothing)."""
    if classes is None:
        if isinstance(label, str):
            return 0.0, f"'label' is {label!r}; valid: a number, as in the other rows"
        return float(label), None
    if isinstance(label, str):
        if label in classes:
            return classes.index(label), None
        return 0, f"'label' is {label!r}, an unknown class{did_you_mean(label, classes)}"
    if isinstance(label, float) or not 0 <= label < len(classes):
        return 0, f"'label' is {label}; valid: 0 to {len(classes) - 1}, or a class name"
    return label, None


def check_class_names(names: Any, origin: str) -> tuple[str, ...] | None:
    """The `labels` entry of a meta.json as class names; absent or null gives `None`."""
    if names is None:
        return None
    texts = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if not texts or len(set(names)) < len(names):
        raise DataError(f"{origin}: 'labels' is {names!r}; valid: a list of distinct class names, or null")
    return tuple(names)
