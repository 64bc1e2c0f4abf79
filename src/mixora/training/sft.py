"""TRL's supervised fine-tuning with the auxiliary losses (apart, because importing TRL takes seconds)."""

from typing import Any

import transformers
import trl
from torch import nn

from mixora.errors import TrainingError
from mixora.training.second_pass import pass_losses
from mixora.training.trainers import AuxiliaryLossMixin
from mixora.training.whole_checkpoints import WholeCheckpoints


class _WithLogits(trl.SFTTrainer):
    """TRL never makes the logits, which losses that compare two passes need; then the loss is transformers' own."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        names = [f"losses.{name}" for name, _, _ in pass_losses(model)] if model.training else []
        if not names:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.args.loss_type != "nll" or self.args.use_liger_kernel:
            raise TrainingError(
                f"{', '.join(names)}: needs the model's logits: got loss_type={self.args.loss_type!r}, "
                f"use_liger_kernel={self.args.use_liger_kernel}; valid: loss_type='nll', use_liger_kernel=False"
            )
        plain = {**inputs, "use_cache": False}
        return transformers.Trainer.compute_loss(self, model, plain, return_outputs, num_items_in_batch)


class SFTTrainer(WholeCheckpoints, AuxiliaryLossMixin, _WithLogits):
    """`trl.SFTTrainer` for models with mixture adapters; takes the same arguments, and those of `mixora.Trainer`.

    With a consistency loss in force, TRL's own readings (entropy, token accuracy) are left out of the log.
    """

    def _why_host_needs_logits(self, model: nn.Module) -> str | None:
        return None if pass_losses(model) else "TRL computes its losses without the whole logits itself"

    def _forget_step(self) -> None:
        super()._forget_step()
        self._metrics["train"].clear()
