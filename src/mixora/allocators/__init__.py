"""How a budget of parameters is spread over the sites (HiLo, arXiv 2502.03884)."""

from mixora.allocators.groups import Groups
from mixora.allocators.proportional import Proportional
from mixora.allocators.sensitivity import Sensitivity
from mixora.allocators.spectral import Spectral
from mixora.contracts import Allocator

ALLOCATORS: dict[str, type[Allocator]] = {
    "groups": Groups,
    "proportional": Proportional,
    "spectral": Spectral,
    "sensitivity": Sensitivity,
}

__all__ = ["ALLOCATORS", "Groups", "Proportional", "Sensitivity", "Spectral"]
