"""What one process sends in a training step, in the rings of Patarasuk and Yuan (2009), which NCCL and gloo use too.

For S bytes on N processes an all-gather or a reduce-scatter sends (N - 1) / N * S from each, an all-reduce twice that.
"""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one process in a step, by kind. `gather_update`: weights after the optimiser's step."""

    all_reduce: int = 0
    gather_forward: int = 0
    gather_backward: int = 0
    reduce_scatter: int = 0
    gather_update: int = 0

    @classmethod
    def of(cls, processes: int, **sizes: int) -> "Traffic":
        """The traffic for collectives over so many bytes, by kind: of what is reduced, or of what was gathered."""
        rounds = {"all_reduce": 2}
        return cls(**{kind: rounds.get(kind, 1) * size * (processes - 1) // processes for kind, size in sizes.items()})

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))
