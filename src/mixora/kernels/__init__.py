"""How the chosen experts of a site are computed: the same values and gradients from every kernel.

Weights of all experts lie below each other, expert after expert, so that experts of unequal rank need no padding.
"""

from mixora.contracts import Kernel
from mixora.kernels.loop import Loop
from mixora.kernels.stacked import Stacked

KERNELS: dict[str, type[Kernel]] = {"loop": Loop, "stacked": Stacked}

__all__ = ["KERNELS", "Loop", "Stacked"]
