"""What one expert computes."""

from mixora.contracts import Expert
from mixora.experts.bottleneck import Bottleneck
from mixora.experts.lora import Lora

EXPERTS: dict[str, type[Expert]] = {"lora": Lora, "bottleneck": Bottleneck}

__all__ = ["EXPERTS", "Bottleneck", "Lora"]
