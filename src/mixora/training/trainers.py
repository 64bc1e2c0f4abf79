"""Our trainers: they open a trace that owns the auxiliary losses and add their sum to the task's loss.

Under a foreign trainer the adapted layers add the gradient themselves (`foreign`). Never both.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from mixora.mixture import mixtures_of
from mixora.training.bad_steps import FiniteSteps
from mixora.training.batch_loss import run_passes, sum_losses
from mixora.training.fused_head import FusedHead, why_not_fused
from mixora.training.idle_sites import IdleSites
from mixora.training.own_loss import reads_num_items
from mixora.training.processes import OwnDraws, check_processes
from mixora.training.processes import average as average_over_processes
from mixora.training.routing_figures import CollapseAlarm, RoutingFigures, average
from mixora.training.second_pass import base_of
from mixora.training.sharding import ShardingCheck, save_adapter, shard_on_cpu
from mixora.training.terms import Terms
from mixora.training.whole_checkpoints import WholeCheckpoints

logger = logging.getLogger("mixora")


class AuxiliaryLossMixin(FiniteSteps):
    """Mix in before a `transformers.Trainer` class: adds the auxiliary losses to the loss and logs them.

    Beside `loss`, which is all of it, a log line holds each term without its coefficient, and `auxiliary_loss`: their
    weighted sum, so that `loss - auxiliary_loss` is the task's own. Where tokens are routed it also holds what the
    routers did since the last line, as means over the sites (`routing/entropy` and so on). `alarm.note` says so where
    the routers collapsed, and `idle_sites.note` where sites got no gradient in the first step; a warning was logged.
    Losses and figures are of the tokens of all processes. Raises `TrainingError` where several were started and do not
    train together.
    """

    _logged_reason: str | None = None

    def __init__(self, *args: Any, fused_loss: bool = True, **kwargs: Any) -> None:
        """`fused_loss`: compute the cross entropy without the whole logits where that is exact."""
        super().__init__(*args, **kwargs)
        trainer: Any = self
        check_processes()
        if trainer.model_accepts_loss_kwargs and not reads_num_items(base_of(trainer.model)):
            trainer.model_accepts_loss_kwargs = False
        trainer.add_callback(OwnDraws())
        if trainer.accelerator.ddp_handler is not None and _draws_routes(trainer.model):
            # no expert that a pass did not draw has a gradient, on purpose
            trainer.accelerator.ddp_handler.find_unused_parameters = True
        self.fused_loss = fused_loss
        self._terms, self.figures, self.alarm = Terms(), RoutingFigures(), CollapseAlarm()
        self.idle_sites = IdleSites()
        trainer.add_callback(self.idle_sites)
        trainer.add_callback(ShardingCheck(self))

    def create_accelerator_and_postprocess(self) -> None:
        """As the trainer does; FSDP2 shards on a CPU too."""
        host: Any = super()
        host.create_accelerator_and_postprocess()
        shard_on_cpu(self)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer does; the adapter's files are written under FSDP2 with sharded states too."""
        host: Any = super()
        host.save_model(output_dir, _internal_call)
        save_adapter(self, output_dir)

    @property
    def fused_loss_reason(self) -> str | None:
        """Why the training loss is not fused with the model's head; None where it is, for all that is known yet.

        That a model changes its logits behind the head shows in the first training step.
        """
        return self._why_not_fused(self.model_wrapped)  # type: ignore[attr-defined]

    def _why_not_fused(self, model: nn.Module) -> str | None:
        if not self.fused_loss:
            return "fused_loss is False"
        if self.compute_loss_func is not None:  # type: ignore[attr-defined]
            return "compute_loss_func may need the logits"
        return self._why_host_needs_logits(model) or why_not_fused(model)

    def _why_host_needs_logits(self, model: nn.Module) -> str | None:
        host: Any = super()
        is_known = host.compute_loss.__func__ is transformers.Trainer.compute_loss
        return None if is_known else "the trainer's own compute_loss may need the logits"

    def _fuse(self, model: nn.Module, return_outputs: bool) -> FusedHead | None:
        """What computes this batch's loss beside the head; None in evaluation and where it cannot."""
        if not model.training or return_outputs:
            return None
        reason = self._why_not_fused(model)
        if reason is not None and reason != self._logged_reason:
            logger.info("the loss is not fused with the model's head: %s", reason)
            self._logged_reason = reason
        smoother = self.label_smoother  # type: ignore[attr-defined]
        return None if reason is not None else FusedHead(model, smoother and smoother.epsilon)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's own loss plus the auxiliary ones, each micro-batch by its share of the accumulated step."""
        host: Any = super()
        # label smoothing takes them out of the inputs
        labels = inputs.get("labels")

        def run(fused: FusedHead | None) -> Any:
            # what is run again must find its labels
            given = inputs if fused is None else {**inputs}
            with self._smoothing_by(fused):
                return host.compute_loss(
                    model, given, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
                )

        passes = run_passes(model, self._fuse(model, return_outputs), run)
        result = passes.result
        if not model.training:
            return result
        self.figures.add(model, passes.trace)
        is_scaled = self._is_scaled(num_items_in_batch)
        share = 1 / self.current_gradient_accumulation_steps if is_scaled else 1.0  # type: ignore[attr-defined]
        tokens = self._tokens_of_step(num_items_in_batch) if is_scaled else None
        total, terms = sum_losses(model, passes, labels, share, tokens)
        task = result[0] if return_outputs else result
        if total is not None:
            self._terms.add({**terms, "auxiliary_loss": total.detach() / share})
        loss = self._guard(task if total is None else task + total, task, terms, labels)
        return (loss, result[1]) if return_outputs else loss

    def _forget_step(self) -> None:
        for readings in (self._terms, self.figures):
            readings.take()

    @contextmanager
    def _smoothing_by(self, fused: FusedHead | None) -> Iterator[None]:
        """Labels are smoothed by `fused` while open, where they are smoothed at all."""
        trainer: Any = self
        own = trainer.label_smoother
        trainer.label_smoother = own if own is None or fused is None else fused.smooth
        try:
            yield
        finally:
            trainer.label_smoother = own

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
        """As the trainer does, with the mean of each auxiliary term and the routers' figures beside the loss."""
        host: Any = super()
        if "loss" in logs:
            sites = self.figures.take()
            logs = {**logs, **average_over_processes(self._terms.take()), **average(sites.values())}
            step = self.state.global_step  # type: ignore[attr-defined]
            if self.alarm.hear(sites, step) and host.is_world_process_zero():
                logger.warning("%s", self.alarm.note)
        host.log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """Beside the random states, what each rank has read since its last log line, or the next one would lack it."""
        host: Any = super()
        trainer: Any = self
        host._save_rng_state(output_dir)
        readings = {
            "loss": trainer._tr_loss,
            "logged_at": trainer._globalstep_last_logged,
            "terms": self._terms.state(),
            "figures": self.figures.state(),
            "alarm": self.alarm.state(),
        }
        torch.save(readings, self._readings_in(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        host: Any = super()
        host._load_rng_state(checkpoint)
        if checkpoint is not None and self._readings_in(checkpoint).is_file():
            self.restore_readings(checkpoint)

    def restore_readings(self, checkpoint: str | Path) -> None:
        """Go on with the losses, figures and alarm of a checkpoint that a trainer of ours wrote."""
        trainer: Any = self
        # gloo's processes call theirs cpu:0, which torch cannot load to
        device = trainer.args.device if trainer.args.device.type != "cpu" else "cpu"
        found = torch.load(self._readings_in(checkpoint), map_location=device, weights_only=True)
        trainer._tr_loss, trainer._globalstep_last_logged = found["loss"], found["logged_at"]
        self._terms.restore(found["terms"])
        self.figures.restore(found["figures"])
        self.alarm.restore(found["alarm"])

    def _readings_in(self, checkpoint: str | Path) -> Path:
        return Path(checkpoint) / f"readings_{self.args.process_index}.pt"  # type: ignore[attr-defined]


def _draws_routes(model: nn.Module) -> bool:
    return any(parts.router.draws for layer in mixtures_of(model) for parts in layer.parts.values())


class Trainer(WholeCheckpoints, AuxiliaryLossMixin, transformers.Trainer):
    """`transformers.Trainer` for models with mixture adapters; takes the same arguments, and two of its own.

    `fused_loss`: compute the cross entropy without the whole logits where that is exact. `skip_bad_steps`: so many
    steps of a run whose loss or gradients are not finite are left out, where the first would stop it with a
    `NonFiniteError`; default 0.
    """
