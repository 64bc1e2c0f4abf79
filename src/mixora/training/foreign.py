"""How auxiliary losses reach the routers under a trainer that is not ours: the layers add the gradient themselves."""

import inspect
from collections import defaultdict
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from mixora.mixture import mixtures_of
from mixora.training.terms import Terms


class AuxiliaryLossCallback(TrainerCallback):
    """For foreign trainers: weighs the injected auxiliary gradient (accumulation, fp16 loss scale), logs each term.

    The last step of an epoch may accumulate fewer micro-batches than `gradient_accumulation_steps`; its auxiliary
    gradient is then weighted by the full number. `mixora.Trainer` is exact there too.
    """

    def __init__(self) -> None:
        self._terms = Terms()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Step before the trackers of `report_to`, which write down a log line as they find it."""
        # the trainer puts its own callbacks first, and no argument leads to their list
        frame = inspect.currentframe()
        handler = frame and frame.f_back and frame.f_back.f_locals.get("self")
        if isinstance(handler, CallbackHandler):
            handler.callbacks.remove(self)
            handler.callbacks.insert(0, self)

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
            for adapter in layer.active_adapters:
                for name, value in layer.readings.get(adapter, {}).items():
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
