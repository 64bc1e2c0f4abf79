"""What random draws follow from, so that a step can be run again as it was."""

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """The generators of Python, NumPy, PyTorch's CPU, and the current GPU where one is in use."""

    python: Any
    numpy: Any
    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls) -> "RandomState":
        """As they stand; some microseconds."""
        gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu)

    def restore(self) -> None:
        """Let them draw again what they drew from here."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu)
