"""A second forward pass over each batch, with routes of its own, and the losses that compare the two (AdaMix)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mixora.contracts import PassLoss
from mixora.errors import TrainingError
from mixora.losses.fused import IGNORED
from mixora.mixture import mixtures_of
from mixora.passes import current, replay
from mixora.passes.entrances import followed_by

Pair = tuple[Tensor | None, Tensor | None]
"""The logits of both passes, as the model gives them; None where it gives none."""
Agreement = tuple[Tensor, Tensor | int]
"""A loss that compares passes, summed over examples or supervised tokens, and their number (at least 1)."""


def pass_losses(model: nn.Module) -> list[tuple[str, PassLoss, float]]:
    """Name, loss and coefficient of the losses that compare passes, of the active adapters."""
    found = {
        name: (name, loss, coefficient)
        for layer in mixtures_of(model)
        for adapter in layer.active_adapters
        if adapter in layer.parts
        for name, loss, coefficient in layer.parts[adapter].pass_losses
    }
    return list(found.values())


@contextmanager
def second_passes(model: nn.Module, close: Callable[[Any, Any], None] | None = None) -> Iterator[list[Pair]]:
    """Have each forward pass of `model` followed by a second one while open, where a loss in force compares the two.

    Gives the list that both passes' logits are added to. The second pass runs inside of the first one's call and hangs
    on its output, so that wrappers for data-parallel training see one forward pass that leads to all parameters in use.
    `close` is called with both outputs (None for a second one that is not run), and may change the first.
    """
    pairs: list[Pair] = []
    losses = pass_losses(model) if model.training else []
    base = base_of(model)

    def follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        second = _run_again(module, args, kwargs) if losses else None
        if close is not None:
            close(output, second)
        if second is not None:
            pairs.append((output.get("logits"), second.get("logits")))
            if all(logits is not None for logits in pairs[-1]):
                output["logits"] = _Hang.apply(*pairs[-1])
        return output

    if not losses and close is None:
        yield pairs
        return
    recomputes = any(loss.recomputes for _, loss, _ in losses)
    with followed_by(base, follow), _recomputed(base) if recomputes else nullcontext():
        yield pairs


def _run_again(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    # an encoder-decoder makes its decoder's input from the labels
    dropped = {"num_items_in_batch", *(() if module.config.is_encoder_decoder else ("labels",))}
    return module(*args, **{name: value for name, value in kwargs.items() if name not in dropped})


@contextmanager
def _recomputed(base: nn.Module) -> Iterator[None]:
    """Have the first pass through `base` keep no activations while open, but run again in backward.

    Autograd works on the latest pass first, so the second one's activations are gone by then.
    """
    own, replaced = base.forward, vars(base).get("forward")
    is_first = True

    @wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_first
        here, is_mine = current(), is_first
        is_first = False
        if here is None or not is_mine:
            return own(*args, **kwargs)
        return checkpoint(own, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), replay(here)), **kwargs)

    base.forward = forward
    try:
        yield
    finally:
        del base.forward
        if replaced is not None:
            base.forward = replaced


class _Hang(torch.autograd.Function):
    """The identity on `first`, from which the graph of `second` can be reached too."""

    @staticmethod
    def forward(ctx: Any, first: Tensor, second: Tensor) -> Tensor:
        return first.view_as(first)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def compare_passes(
    model: nn.Module, pairs: list[Pair], labels: Tensor | None, tokens: Any = None, agreement: Agreement | None = None
) -> dict[str, tuple[Tensor, float]]:
    """Each loss on the agreement of two passes, by name, with its coefficient: an fp32 scalar with its graph.

    It is the mean over examples, or over supervised tokens; with `tokens`, the sum over these divided by that number.
    `agreement` is the sum where it is known already. Raises `TrainingError` where the outputs cannot be compared.
    """
    compared = {}
    for name, loss, coefficient in pass_losses(model) if pairs else ():
        total, count = agreement or _total(name, loss, base_of(model), pairs, labels)
        is_over_tokens = tokens is not None and labels is not None and labels.dim() > 1
        compared[name] = (total / (tokens if is_over_tokens else count), coefficient)
    return compared


def _total(name: str, loss: PassLoss, base: Any, pairs: list[Pair], labels: Tensor | None) -> Agreement:
    ((first, second),) = pairs
    if first is None or second is None:
        raise TrainingError(f"losses.{name}: needs the model's logits, which its output lacks; valid: coefficient 0")
    value_N = loss.of_items(*_select_items(base, first, second, labels, name))
    return value_N.sum(), max(len(value_N), 1)


def _select_items(
    base: Any, first: Tensor, second: Tensor, labels: Tensor | None, name: str
) -> tuple[Tensor, Tensor, bool]:
    """The outputs of both passes for each item, [N, C], and whether they are numbers rather than logits."""
    if labels is None:
        raise TrainingError(f"losses.{name}: the batch has no labels, which tell the supervised tokens; valid: labels")
    if first.dim() == 2:
        problem = base.config.problem_type
        if problem == "multi_label_classification":
            raise TrainingError(
                f"losses.{name}: compares distributions over classes, and this model's labels are independent of each "
                "other; valid: single-label classification, regression, or coefficient 0"
            )
        return first, second, problem == "regression" or first.shape[-1] == 1
    if first.dim() != 3 or labels.dim() != 2:
        raise TrainingError(
            f"losses.{name}: cannot compare outputs of shape {list(first.shape)} with labels of shape "
            f"{list(labels.shape)}; valid: one distribution for each row or token"
        )
    if _predicts_the_next(base):
        first, second, labels = first[:, :-1], second[:, :-1], labels[:, 1:]
    kept = labels != IGNORED
    return first[kept], second[kept], False


def _predicts_the_next(base: Any) -> bool:
    """Whether the output at a token is about the one behind it, as in causal language models."""
    is_token_classifier = "TokenClassification" in type(base).__name__
    return not base.config.is_encoder_decoder and not is_token_classifier and "MaskedLM" not in type(base).__name__


def base_of(model: Any) -> Any:
    """The model inside of the wrappers of PEFT and of data-parallel training."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model
