"""The adapted module and what serves it: base(x) + experts(x, router(x)), alone or joined with others, and folded."""

from mixora.mixture.layer import PREFIX, Mixture, mixtures_of

__all__ = ["PREFIX", "Mixture", "mixtures_of"]
