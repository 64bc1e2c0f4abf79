"""One forward pass: its tokens, the hooks that read them, losses under foreign trainers, what backward needs."""

from mixora.passes.forward import (
    Pass,
    Pooled,
    Shared,
    Stream,
    current,
    current_trace,
    entered,
    replay,
    tracing,
)

__all__ = ["Pass", "Pooled", "Shared", "Stream", "current", "current_trace", "entered", "replay", "tracing"]
