"""How the auxiliary losses reach the routers: in the loss of our trainers, by injection with any other.

A trainer of ours opens a trace that owns the losses and adds their sum to the task's loss. Under a foreign trainer
the adapted layers add the gradient themselves; `AuxiliaryLossCallback` tells them its weight and logs the terms. Never
both.
"""

from collections import defaultdict
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixora.errors import TrainingError
from mixora.mixture import Mixture
from mixora.passes import tracing
from mixora.routing import Trace


def mixtures_of(model: nn.Module) -> list[Mixture]:
    """The adapted modules of a model, in its order."""
    return [module for module in model.modules() if isinstance(module, Mixture)]


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
        with tracing(owns_losses=True) as trace:
            result = host.compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
            )
        if not model.training:
            return result
        total, terms = auxiliary_loss(model, trace)
        if total is None:
            return result
        self._terms = self._terms or Terms()
        self._terms.add({**terms, "auxiliary_loss": total.detach()})
        share = total / self.current_gradient_accumulation_steps if self._is_scaled(num_items_in_batch) else total  # type: ignore[attr-defined]
        return (result[0] + share, result[1]) if return_outputs else result + share

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
