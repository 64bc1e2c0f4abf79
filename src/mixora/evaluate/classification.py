"""Classes or numbers predicted for rows, and how well they fit."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import nn

from mixora.display.stages import Advance
from mixora.errors import DataError
from mixora.evaluate.inference import batch_by_length, inference
from mixora.evaluate.perplexity import Collate


def predict(
    model: nn.Module, dataset: Any, collator: Collate, batch_size: int, advance: Advance | None = None
) -> list[int] | list[float]:
    """The most likely class of each row, or the predicted number where the labels are floats; in row order.

    Raises:
        DataError: no rows, or the model's outputs do not suit the labels.
    """
    rows = list(dataset)
    results: list[Any] = [None] * len(rows)
    with inference(model) as device:
        for batch in batch_by_length([len(row["input_ids"]) for row in rows], batch_size, advance):
            tensors = {name: tensor.to(device) for name, tensor in collator([rows[r] for r in batch]).items()}
            labels = tensors.pop("labels")
            logits = model(**tensors).logits.float()
            _check_outputs(logits.shape[-1], labels.tolist())
            chosen = logits[:, 0] if labels.is_floating_point() else logits.argmax(dim=-1)
            for row, value in zip(batch, chosen.tolist(), strict=True):
                results[row] = value
    return results


def _check_outputs(outputs: int, labels: list[int] | list[float]) -> None:
    if isinstance(labels[0], float):
        if outputs != 1:
            raise DataError(f"the labels are floats, but the model has {outputs} outputs; valid: 1")
    elif outputs <= max(1, *labels):
        raise DataError(f"the model has {outputs} output(s), but a label is class {max(labels)} (counted from 0)")


def classification_scores(predictions: Sequence[int], labels: Sequence[int], classes: int) -> dict[str, float]:
    """Accuracy, F1 and Matthews correlation.

    F1 is that of class 1 where there are two classes, else the mean over the classes that occur (macro); a class
    never predicted scores 0. The correlation is 0 where labels or predictions are all alike.
    """
    kind = {"average": "binary"} if classes == 2 else {"average": "macro"}
    alike = len(set(labels)) == 1 or len(set(predictions)) == 1
    return {
        "accuracy": float(accuracy_score(labels, predictions)),
        "f1": float(f1_score(labels, predictions, zero_division=0, **kind)),
        "mcc": 0.0 if alike else float(matthews_corrcoef(labels, predictions)),
    }


def regression_scores(predictions: Sequence[float], labels: Sequence[float]) -> dict[str, float]:
    """Pearson and Spearman correlation; 0.0, without a warning, where labels or predictions are all alike.

    A correlation of fewer than two rows is 0.0 as well. Predictions that are not finite are a `DataError`.
    """
    if not all(math.isfinite(p) for p in predictions):
        raise DataError("the model predicts numbers that are not finite, so no correlation exists")
    if len(labels) < 2 or _alike(predictions) or _alike(labels):
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": float(pearsonr(predictions, labels).statistic),
        "spearman": float(spearmanr(predictions, labels).statistic),
    }


def _alike(values: Sequence[float]) -> bool:
    """True where the spread is no more than rounding, which scipy warns about."""
    spread = np.ptp(np.asarray(values, dtype=np.float64))
    return bool(spread <= 1e-9 * max(1.0, float(np.max(np.abs(values)))))
