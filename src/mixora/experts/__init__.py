"""What one expert computes."""

from mixora.contracts import Expert
from mixora.experts.bottleneck import Bottleneck
from mixora.experts.ffn_lora import FfnLora
from mixora.experts.hydra import Hydra
from mixora.experts.lora import Lora

EXPERTS: dict[str, type[Expert]] = {
    "lora": Lora,
    "hydra": Hydra,
    "bottleneck": Bottleneck,
    "ffn_lora": FfnLora,
}

__all__ = ["EXPERTS", "Bottleneck", "FfnLora", "Hydra", "Lora"]
