"""Metrics of a model on rows: loss and perplexity, generated answers, classes and numbers, multiple choice.

Knows nothing of adapters, nor of where rows come from: the caller fills `Examples`.
"""

from mixora.evaluate.evaluation import (
    METRICS,
    Evaluation,
    EvaluationConfig,
    Examples,
    Formed,
    choose_metrics,
    default_metrics,
    evaluate,
)
from mixora.evaluate.generation import generate
from mixora.evaluate.perplexity import token_loss
from mixora.evaluate.scores import SCORES

__all__ = [
    "METRICS",
    "SCORES",
    "Evaluation",
    "EvaluationConfig",
    "Examples",
    "Formed",
    "choose_metrics",
    "default_metrics",
    "evaluate",
    "generate",
    "token_loss",
]
