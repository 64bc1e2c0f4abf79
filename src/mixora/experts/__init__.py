"""What one expert computes."""

from mixora.contracts import Expert
from mixora.experts.lora import Lora

EXPERTS: dict[str, type[Expert]] = {"lora": Lora}

__all__ = ["EXPERTS", "Lora"]
