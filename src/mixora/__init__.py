"""Fine-tune Hugging Face models with mixtures of adapters."""

from mixora.plan import Plan
from mixora.recipes import recipe_names
from mixora.tuner import MixoraConfig, plan, recipe, register

__version__ = "0.1.0"
__all__ = ["MixoraConfig", "Plan", "plan", "recipe", "recipe_names"]

register()
