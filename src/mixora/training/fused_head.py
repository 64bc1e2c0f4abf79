"""How the fused loss gets between a model and its loss: for one batch, the head hands on what it was given.

The model then calls its loss function with hidden states, and the one that stands in for it computes the loss from
them. So labels, shifts, auxiliary losses of the model's own and all scaling remain transformers'. What cannot be told
beforehand (a model that scales its logits) shows in the model's output, and the batch is run again with the head.
"""

import inspect
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from mixora.losses.consistency import Consistency
from mixora.losses.fused import IGNORED, cross_entropy, cross_entropy_and_agreement, product_dtype
from mixora.training.second_pass import Agreement, base_of, pass_losses

Result = TypeVar("Result")
logger = logging.getLogger("mixora")
_found: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Models that turned out to need their logits, and what for."""


class LogitsNeededError(Exception):
    """The model does something with its logits beside handing them to its loss; never seen by users."""


class FusedHead:
    """What stands in for the head and the loss of a causal language model while one batch's loss is computed.

    `smoothing`: the share of each label that the trainer spreads over the vocabulary; it then asks `smooth` for the
    loss when the model is through. `agreement`: where two passes are compared, what `Consistency` says of them; it is
    known when the loss is.
    """

    def __init__(self, model: nn.Module, smoothing: float | None = None) -> None:
        self._base = base_of(model)
        self._head: nn.Linear = self._base.get_output_embeddings()
        self._smoothing = smoothing
        self._given: list[tuple[Tensor, int]] = []
        self._asked: tuple[Tensor, Any] | None = None
        self._second: Tensor | None = None
        self._dtype = self._head.weight.dtype
        self.agreement: Agreement | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Let the head hand on its input, and have the model ask this object for its loss, while open."""
        own = vars(self._base).get("_loss_function")
        self._head.forward = self._hand_on  # type: ignore[method-assign, assignment]
        self._base.loss_function = self._note_targets
        try:
            yield
        finally:
            del self._head.forward
            del self._base._loss_function
            if own is not None:
                self._base.loss_function = own

    def _hand_on(self, hidden: Tensor) -> Tensor:
        self._dtype = product_dtype(self._head.weight)
        self._given.append((hidden, hidden._version))
        return hidden

    def _note_targets(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int,
        num_items_in_batch: Any = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss function's stand-in. A second pass may be still to come, so the loss is added by `close`."""
        self._check(0, logits)
        if vocab_size != self._head.out_features or kwargs.get("ignore_index", IGNORED) != IGNORED:
            raise LogitsNeededError("the model's loss is not the plain one")
        targets = _shift(labels) if shift_labels is None else shift_labels
        self._asked = targets, num_items_in_batch
        return logits.new_zeros((), dtype=torch.float32)

    def close(self, output: Any, second: Any) -> None:
        """Called when the pass, or the second one after it, is over: puts the loss into the first one's `output`."""
        if not self._given:
            return
        for number, of_pass in enumerate([output] if second is None else [output, second]):
            self._check(number, of_pass.get("logits") if isinstance(of_pass, dict) else None)
        first, self._second = output["logits"], None if second is None else second["logits"]
        asked, self._asked = self._asked, None
        self._given.clear()
        if self._smoothing is None:
            if asked is None:
                raise LogitsNeededError("the loss is not computed by the model")
            output["loss"] = output["loss"] + self._mean(first, *asked)
            output["logits"] = None

    def smooth(self, output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None) -> Tensor:
        """Stands in for the label smoother, which transformers' trainer calls with the model's output."""
        return self._mean(output["logits"], _shift(labels) if shift_labels else labels, num_items_in_batch)

    def _mean(self, first: Tensor, targets: Tensor, items: Any) -> Tensor:
        labels = targets.flatten().to(first.device)
        count = (labels != IGNORED).sum().clamp(min=1)
        head, settings = self._head, (self._smoothing or 0.0, self._dtype)
        if self._second is None:
            task = cross_entropy(first.flatten(0, -2), head.weight, labels, head.bias, *settings)
        else:
            both = first.flatten(0, -2), self._second.flatten(0, -2)
            task, apart = cross_entropy_and_agreement(*both, head.weight, labels, head.bias, *settings)
            self.agreement = apart, count
        return task / (count if items is None else torch.as_tensor(items, device=task.device))

    def _check(self, number: int, logits: Any) -> None:
        """That `logits` are what the head handed on in that pass, and nothing was done to them since."""
        given, version = self._given[number] if number < len(self._given) else (None, None)
        if given is None or logits is not given or given._version != version:
            raise LogitsNeededError("the model changes its logits behind the head, or uses them elsewhere")


def _shift(labels: Any) -> Tensor:
    """The label of each position's successor."""
    return F.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def run_fused(fused: FusedHead | None, model: nn.Module, run: Callable[[FusedHead | None], Result]) -> Result:
    """`run(fused)` with the stand-ins in place; `run(None)` where there are none, or where the model needs its logits.

    The latter is remembered, so that it costs one pass in the life of a model.
    """
    if fused is not None:
        try:
            with fused.installed():
                return run(fused)
        except LogitsNeededError as error:
            logger.debug("the batch is run again with the model's head: %s", error)
            _found[base_of(model)] = str(error)
    return run(None)


def why_not_fused(model: nn.Module) -> str | None:
    """Why the loss of `model` cannot be fused with its head; None where it can, for all that is known yet."""
    base = base_of(model)
    if base in _found:
        return _found[base]
    if isinstance(model, nn.DataParallel):
        return "nn.DataParallel copies the model"
    if any(m._compiled_call_impl is not None or "_orig_mod" in m._modules for m in model.modules()):
        return "the model is compiled"
    others = [name for name, loss, _ in pass_losses(model) if type(loss) is not Consistency]
    if others:
        return f"losses.{others[0]} compares logits"
    return _why_not_head(base) or _why_not_loss(base)


def _why_not_head(base: Any) -> str | None:
    head = base.get_output_embeddings() if isinstance(base, PreTrainedModel) else None
    if head is None:
        return "the model has no language-model head"
    if type(head) is not nn.Linear:
        return f"the model's head is no plain linear: {type(head).__name__}"
    if any(p.requires_grad for p in head.parameters()):
        return "the model's head is trained"
    is_whole = head.weight.shape == (head.out_features, head.in_features) and head.weight.is_floating_point()
    if not is_whole or any(type(p.data) is not Tensor or hasattr(p, "ds_id") for p in head.parameters()):
        return "the model's head is sharded or quantised"
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head):
        return "the model's head has hooks"
    return None


def _why_not_loss(base: Any) -> str | None:
    if base.config.is_encoder_decoder:
        return "the model is an encoder-decoder"
    # models that compute their loss in place would do so on hidden states
    code = inspect.unwrap(type(base).forward).__code__
    if base.loss_function is not ForCausalLMLoss or "loss_function" not in code.co_names:
        return "the model's loss is not transformers' causal one"
    return None
