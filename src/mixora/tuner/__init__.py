"""The PEFT face: configuration, tuner, what its tensors are called in files, and which experts serve in evaluation."""

from mixora.tuner.config import MixoraConfig, allocate, plan, recipe
from mixora.tuner.model import register

register()

__all__ = ["MixoraConfig", "allocate", "plan", "recipe"]
