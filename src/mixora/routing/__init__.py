"""What a router decided for the tokens of a pass, and what was drawn for it."""

from mixora.routing.record import Observation, Routing, Tokens, Trace

__all__ = ["Observation", "Routing", "Tokens", "Trace"]
