"""Everything mixora raises on a user's mistake: one clear message that names what was got and what is valid.

The command line turns these into one line and exit code 2; anything else is a fault of ours (exit code 1).
"""

MOST_NAMED = 1000
"""So many findings are named in one message; of more, their number is told."""


class MixoraError(Exception):
    """Root of every error that a user can cause."""


class ConfigError(MixoraError, ValueError):
    """A recipe, run file or override is wrong."""


class DataError(MixoraError, ValueError):
    """Rows are missing, unreadable or of the wrong form."""


class ModelError(MixoraError, ValueError):
    """The base model does not offer what the plan needs."""


class CheckpointError(MixoraError, ValueError):
    """An adapter on disk does not fit the model or is damaged."""


class UnwrittenError(MixoraError):
    """A disk or the hub took no more; the message names what was not written, and what is left or what to do."""


class StoppedError(MixoraError):
    """A signal ended a run that can go on; the message says how."""


class TrainingError(MixoraError, RuntimeError):
    """A set-up in which training would silently do something else than asked."""


class NonFiniteError(MixoraError, ArithmeticError):
    """A training step met NaN or Inf; no weight was changed, and the message names the place."""
