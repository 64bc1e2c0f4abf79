"""A signal ends training after the step at hand, with a checkpoint; a second one ends it at once."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from mixora.training.processes import agree, is_first

SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTICE = b"\nstopping after this step, with a checkpoint; once more to stop at once\n"


class Interruption(TrainerCallback):
    """While open, the first signal asks the trainer to save and stop. `requested` tells whether one came.

    The last step is saved as well, so that what follows training can be interrupted without loss.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        # only the main thread may set handlers
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # a handler may run in the middle of another write, which buffered streams do not bear
        if is_first():
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, NOTICE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save where this step is the last; a signal to one process stops all."""
        control.should_training_stop |= agree(self.requested)
        control.should_save |= control.should_training_stop or state.global_step >= state.max_steps
