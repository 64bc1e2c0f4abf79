"""How the chosen experts of a site are computed: the same values and gradients from every kernel.

Weights of all experts lie below each other, expert after expert, so that experts of unequal rank need no padding.
"""

from mixora.contracts import Kernel
from mixora.kernels.grouped import Grouped
from mixora.kernels.joint import Joint
from mixora.kernels.loop import Loop
from mixora.kernels.sorted import Sorted
from mixora.kernels.stacked import Stacked
from mixora.kernels.triton import Triton

KERNELS: dict[str, type[Kernel]] = {
    "loop": Loop,
    "stacked": Stacked,
    "joint": Joint,
    "sorted": Sorted,
    "grouped": Grouped,
    "triton": Triton,
}

__all__ = ["KERNELS", "Grouped", "Joint", "Loop", "Sorted", "Stacked", "Triton"]
