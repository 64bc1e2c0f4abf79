"""What a training step takes, counted on the meta device: memory by strategy, parameters, traffic. No weights."""

from mixora.footprint.communication import Traffic
from mixora.footprint.estimate import Footprint, Memory, estimate
from mixora.footprint.parameters import Parameters, count_base
from mixora.footprint.step import Loss
from mixora.footprint.strategies import STRATEGIES, Single, Strategy

__all__ = [
    "STRATEGIES",
    "Footprint",
    "Loss",
    "Memory",
    "Parameters",
    "Single",
    "Strategy",
    "Traffic",
    "count_base",
    "estimate",
]
