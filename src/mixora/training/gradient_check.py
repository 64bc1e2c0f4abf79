"""Does the router receive the auxiliary gradient it should, on the user's own model, data and trainer?"""

import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import TrainerCallback

from mixora.errors import TrainingError
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from mixora.training.batch_loss import auxiliary_loss
from mixora.training.foreign import AuxiliaryLossCallback

TOLERANCE = 1e-3


@dataclass(frozen=True)
class RouterGradient:
    """What reached the routers: `ratio` of the intended auxiliary gradient (1 is right), `error` the relative distance.

    `message` says it in one sentence, with what to do.
    """

    ratio: float
    error: float
    message: str

    @property
    def is_right(self) -> bool:
        """Whether the gradient is the intended one."""
        return self.error < TOLERANCE

    def __str__(self) -> str:
        return self.message


def check_router_gradient(trainer: transformers.Trainer) -> RouterGradient:
    """Run one accumulated step of `trainer` twice, with and without auxiliary losses, and compare with the intended.

    Weights, random state and trackers stay as they are; no optimiser step is taken. The intended gradient is that of
    the mean auxiliary loss of the step's micro-batches. Raises `TrainingError` for a model without auxiliary losses.
    """
    model = trainer.model
    layers = mixtures_of(model)
    if not any(parts.losses for layer in layers for parts in layer.parts.values()):
        raise TrainingError("no auxiliary loss is in force on this model; valid: a recipe with a coefficient above 0")
    with _random_state_kept():
        with_losses, batches = _one_step(trainer)
        with _losses_off(model):
            without, _ = _one_step(trainer)
        intended = _intended(trainer, batches)
    injected = with_losses - without
    size = intended.norm()
    ratio = float(injected @ intended / size**2)
    error = float((injected - intended).norm() / size)
    return RouterGradient(ratio, error, _sentence(ratio, error))


def _sentence(ratio: float, error: float) -> str:
    if error < TOLERANCE:
        return f"The routers receive the intended auxiliary gradient (ratio {ratio:.4f})."
    if abs(ratio) < TOLERANCE:
        return "The routers receive no auxiliary gradient: train with mixora.Trainer or mixora.SFTTrainer."
    return (
        f"The routers receive {ratio:.3f} times the intended auxiliary gradient (relative error {error:.1e}): "
        "train with mixora.Trainer or mixora.SFTTrainer, or add mixora.AuxiliaryLossCallback() to the callbacks."
    )


class _BeforeUpdateError(Exception):
    """Ends a training step once its gradients are complete."""


class _Catch(TrainerCallback):
    """Keeps the routers' gradients and stops before the optimiser uses them."""

    def __init__(self) -> None:
        self.gradient: Tensor | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.gradient = _gradients(kwargs["model"])
        raise _BeforeUpdateError


def _routers(model: nn.Module) -> list[nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".mixora_router" in name and p.requires_grad]


def _gradients(model: nn.Module) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad.detach() for p in _routers(model)]
    return torch.cat([p.flatten().double() for p in parts])


def _one_step(trainer: Any) -> tuple[Tensor, list[tuple[Tensor, Any]]]:
    """The routers' gradients after one accumulated step, and each micro-batch with the random state it began with."""
    catch, batches, own_step = _Catch(), [], trainer.training_step

    def step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        batches.append((torch.get_rng_state(), dict(inputs)))
        return own_step(model, inputs, *args, **kwargs)

    handler = trainer.callback_handler
    own_callbacks = handler.callbacks
    # trackers and progress bars must not see a step that never happened
    kept = (transformers.trainer_callback.DefaultFlowCallback, AuxiliaryLossCallback)
    handler.callbacks = [c for c in own_callbacks if isinstance(c, kept)] + [catch]
    trainer.training_step = step
    transformers.set_seed(trainer.args.seed)
    try:
        trainer.train()
    except _BeforeUpdateError:
        pass
    finally:
        handler.callbacks = own_callbacks
        del trainer.training_step
        trainer.model.zero_grad(set_to_none=True)
        for layer in mixtures_of(trainer.model):
            layer.auxiliary_scale = 1.0
    assert catch.gradient is not None
    return catch.gradient, batches


def _intended(trainer: Any, batches: list[tuple[Tensor, Any]]) -> Tensor:
    """The gradient of the mean auxiliary loss of `batches`, averaged over data-parallel ranks."""
    model = trainer.model
    known = inspect.signature(getattr(model, "get_base_model", lambda: model)().forward).parameters
    model.train()
    for random_state, inputs in batches:
        torch.set_rng_state(random_state)
        inputs = trainer._prepare_inputs({name: value for name, value in inputs.items() if name in known})
        with tracing(owns_losses=True) as trace:
            model(**inputs)
        total, _ = auxiliary_loss(model, trace)
        assert total is not None
        (total / len(batches)).backward()
    gradient = _gradients(model)
    model.zero_grad(set_to_none=True)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient


@contextmanager
def _losses_off(model: nn.Module) -> Iterator[None]:
    parts = [p for layer in mixtures_of(model) for p in layer.parts.values()]
    kept = [p.losses for p in parts]
    for p in parts:
        p.losses = []
    try:
        yield
    finally:
        for p, losses in zip(parts, kept, strict=True):
            p.losses = losses


@contextmanager
def _random_state_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
