"""How the auxiliary losses reach the routers: in the loss of our trainers, by injection with any other.

A trainer of ours opens a trace that owns the losses and adds their sum to the task's loss. Under a foreign trainer
the adapted layers add the gradient themselves; `AuxiliaryLossCallback` tells them its weight and logs the terms. Never
both.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixora.errors import TrainingError
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from mixora.routing import Trace
from mixora.training.second_pass import Pair, compare_passes, second_passes


def auxiliary_loss(model: nn.Module, trace: Trace) -> tuple[Tensor | None, dict[str, Tensor]]:
    """The sum of all auxiliary losses over the traced passes that had gradients on, averaged over these passes.

    Returns an fp32 scalar with its graph, None where no loss is in force; and each term's mean over the sites, detached
    and without its coefficient. Raises `TrainingError` where checkpointing cut the routers off the graph.
    """
    layers = {layer.path: layer for layer in mixtures_of(model)}
    seen = [o for o in trace.observations if o.with_grad and o.path in layers]
    total, terms = None, defaultdict(list)
    for observation in seen:
        logits = observation.routing.logits_TE
        if (
            logits is not None
            and not logits.requires_grad
            and layers[observation.path].is_router_trained(observation.adapter)
        ):
            raise TrainingError(
                f"{observation.path}: re-entrant activation checkpointing cuts the router off the auxiliary loss; "
                "valid: activation_checkpointing_kwargs={'use_reentrant': False}"
            )
        value, of_site = layers[observation.path].parts[observation.adapter].total(observation.routing)
        if value is not None:
            total = value if total is None else total + value
        for name, term in of_site.items():
            terms[name].append(term)
    passes = len({o.pass_index for o in seen})
    return None if total is None else total / passes, {name: torch.stack(t).mean() for name, t in terms.items()}


def sum_losses(
    model: nn.Module, trace: Trace, pairs: list[Pair], labels: Tensor | None, share: float = 1.0, tokens: Any = None
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """All auxiliary losses of a micro-batch, by its `share` of the accumulated step.

    `pairs`: the logits of compared passes. `tokens`: those of the whole step, by which losses over tokens are divided.
    Returns the weighted sum with its graph, None where no loss is in force, and each term for the log.
    """
    total, terms = auxiliary_loss(model, trace)
    total = None if total is None else total * share
    for name, (value, coefficient) in compare_passes(model, pairs, labels, tokens).items():
        of_step = value * share if tokens is None else value
        total = of_step * coefficient if total is None else total + of_step * coefficient
        terms[name] = of_step.detach() / share
    return total, terms


def compute_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one batch with all auxiliary losses in it, for training loops of your own.

    `batch`: what the model's forward takes, labels included. Runs the second pass where a loss needs it. Returns the
    loss, a scalar with its graph, and each auxiliary term detached and without its coefficient. Raises `TrainingError`.
    """
    with tracing(owns_losses=True) as trace, second_passes(model) as pairs:
        outputs = model(**batch)
    total, terms = sum_losses(model, trace, pairs, batch.get("labels")) if model.training else (None, {})
    return outputs.loss if total is None else outputs.loss + total, terms


class Terms:
    """Means of the auxiliary terms since they were last read."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, terms: dict[str, Tensor]) -> None:
        """One micro-batch's terms."""
        for name, value in terms.items():
            self._seen[name].append(value)

    def take(self) -> dict[str, float]:
        """The means, for a log; starts anew."""
        means = {name: torch.stack(values).float().mean().item() for name, values in self._seen.items()}
        self._seen.clear()
        return means


class AuxiliaryLossMixin:
    """Mix in before a `transformers.Trainer` class: adds the auxiliary losses to the loss and logs them.

    Beside `loss`, which is all of it, a log line holds each term without its coefficient, and `auxiliary_loss`: their
    weighted sum, so that `loss - auxiliary_loss` is the task's own.
    """

    _terms: Terms | None = None

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's own loss plus the auxiliary ones, each micro-batch by its share of the accumulated step."""
        host: Any = super()
        # label smoothing takes them out of the inputs
        labels = inputs.get("labels")
        with tracing(owns_losses=True) as trace, second_passes(model) as pairs:
            result = host.compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if not model.training:
            return result
        is_scaled = self._is_scaled(num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps if is_scaled else 1.0  # type: ignore[attr-defined]
        tokens = self._tokens_of_step(num_items_in_batch) if is_scaled else None
        total, terms = sum_losses(model, trace, pairs, labels, share, tokens)
        if total is None:
            return result
        self._terms = self._terms or Terms()
        self._terms.add({**terms, "auxiliary_loss": total.detach() / share})
        return (result[0] + total, result[1]) if return_outputs else result + total

    def _tokens_of_step(self, num_items_in_batch: Any) -> Any:
        """By how many tokens the accumulated step divides; the trainer multiplies by the ranks that it counted over."""
        trainer: Any = self
        if num_items_in_batch is None or not trainer.args.average_tokens_across_devices:
            return num_items_in_batch
        return num_items_in_batch / trainer.accelerator.num_processes

    def _is_scaled(self, num_items_in_batch: Any) -> bool:
        """Whether the loss is already normalised over the accumulated batch, so that the trainer will not divide it."""
        trainer: Any = self
        stated = getattr(trainer, "loss_is_scaled_for_ga", None)
        if stated is not None:
            return bool(stated)
        by_model = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        return bool(by_model or trainer.compute_loss_func is not None)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer does, with the mean of each auxiliary term beside the loss."""
        if "loss" in logs and self._terms is not None:
            logs = {**logs, **self._terms.take()}
        host: Any = super()
        host.log(logs, *args, **kwargs)


class Trainer(AuxiliaryLossMixin, transformers.Trainer):
    """`transformers.Trainer` for models with mixture adapters; takes the same arguments."""


class AuxiliaryLossCallback(TrainerCallback):
    """For foreign trainers: weighs the injected auxiliary gradient (accumulation, fp16 loss scale), logs each term.

    The last step of an epoch may accumulate fewer micro-batches than `gradient_accumulation_steps`; its auxiliary
    gradient is then weighted by the full number. `mixora.Trainer` is exact there too.
    """

    def __init__(self) -> None:
        self._terms = Terms()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the weight of each micro-batch of this step."""
        scale = 1.0 / args.gradient_accumulation_steps
        scaler = getattr(kwargs.get("optimizer"), "scaler", None)
        if scaler is not None:
            scale *= scaler.get_scale()
        for layer in mixtures_of(kwargs["model"]):
            layer.auxiliary_scale = scale

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the terms of one micro-batch."""
        readings = defaultdict(list)
        for layer in mixtures_of(kwargs["model"]):
            for of_adapter in layer.readings.values():
                for name, value in of_adapter.items():
                    readings[name].append(value)
        self._terms.add({name: torch.stack(values).mean() for name, values in readings.items()})

    on_step_end = on_substep_end

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means to the log line and to the history."""
        if logs is not None and "loss" in logs:
            means = self._terms.take()
            logs.update(means)
            state.log_history[-1].update(means)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Back to weight 1, for loops written by hand."""
        for layer in mixtures_of(kwargs["model"]):
            layer.auxiliary_scale = 1.0
