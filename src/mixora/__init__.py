"""Fine-tune Hugging Face models with mixtures of adapters."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixora.conversion import convert
    from mixora.conversion.crafting import craft
    from mixora.diagnostics.measure import inspect
    from mixora.diagnostics.residual import residual_energy
    from mixora.loading import from_pretrained
    from mixora.merging import Approximation, merge
    from mixora.planning.outside import allow_parts
    from mixora.planning.plan import Plan
    from mixora.recipes import recipe_names
    from mixora.standalone import write_standalone
    from mixora.training.batch_loss import compute_loss
    from mixora.training.foreign import AuxiliaryLossCallback
    from mixora.training.gradient_check import check_router_gradient
    from mixora.training.sft import SFTTrainer
    from mixora.training.trainers import Trainer
    from mixora.tuner import MixoraConfig, allocate, plan, recipe
    from mixora.tuner.serving import served_by

__all__ = [
    "Approximation",
    "AuxiliaryLossCallback",
    "MixoraConfig",
    "Plan",
    "SFTTrainer",
    "Trainer",
    "allocate",
    "allow_parts",
    "check_router_gradient",
    "compute_loss",
    "convert",
    "craft",
    "from_pretrained",
    "inspect",
    "merge",
    "plan",
    "recipe",
    "recipe_names",
    "residual_energy",
    "served_by",
    "write_standalone",
]

_AT_ONCE = {
    "MixoraConfig": "mixora.tuner",
    "Plan": "mixora.planning.plan",
    "allocate": "mixora.tuner",
    "allow_parts": "mixora.planning.outside",
    "plan": "mixora.tuner",
    "recipe": "mixora.tuner",
    "recipe_names": "mixora.recipes",
}
# what pulls in trainers is imported when first asked for
_LATER = {
    "Approximation": "mixora.merging",
    "AuxiliaryLossCallback": "mixora.training.foreign",
    "SFTTrainer": "mixora.training.sft",
    "Trainer": "mixora.training.trainers",
    "check_router_gradient": "mixora.training.gradient_check",
    "compute_loss": "mixora.training.batch_loss",
    "convert": "mixora.conversion",
    "craft": "mixora.conversion.crafting",
    "from_pretrained": "mixora.loading",
    "inspect": "mixora.diagnostics.measure",
    "merge": "mixora.merging",
    "residual_energy": "mixora.diagnostics.residual",
    "served_by": "mixora.tuner.serving",
    "write_standalone": "mixora.standalone",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("mixora")
    if name not in _LATER:
        raise AttributeError(f"module 'mixora' has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)


def import_face() -> None:
    """Put the names in place that `import mixora` gives at once, which makes PEFT know the adapters."""
    globals().update({name: getattr(import_module(module), name) for name, module in _AT_ONCE.items()})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# the script imports torch and PEFT only for commands that need them
if "mixora_command" not in sys.modules:
    import_face()
