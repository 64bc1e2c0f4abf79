"""A mixture as one ordinary LoRA adapter or one dense model: exactly where that can be, else as near as data allow."""

from mixora.merging.approximation import Approximation
from mixora.merging.comparison import Comparison
from mixora.merging.procedure import foresee, merge
from mixora.merging.result import Form, Merged, MergedSite

__all__ = ["Approximation", "Comparison", "Form", "Merged", "MergedSite", "foresee", "merge"]
