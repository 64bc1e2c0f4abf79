"""What one expert computes."""

from mixora.contracts import Expert
from mixora.experts.bottleneck import Bottleneck
from mixora.experts.hydra import Hydra
from mixora.experts.lora import Lora

EXPERTS: dict[str, type[Expert]] = {"lora": Lora, "hydra": Hydra, "bottleneck": Bottleneck}

__all__ = ["EXPERTS", "Bottleneck", "Hydra", "Lora"]
