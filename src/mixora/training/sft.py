"""TRL's supervised fine-tuning with the auxiliary losses (apart, because importing TRL takes seconds)."""

import trl

from mixora.training.trainers import AuxiliaryLossMixin


class SFTTrainer(AuxiliaryLossMixin, trl.SFTTrainer):
    """`trl.SFTTrainer` for models with mixture adapters; takes the same arguments."""
