"""Processes that end with the one that started them, even where that one was killed and could tell nobody.

The starter holds one end of a pipe, into which nothing is ever written; the system closes it with the process.
"""

import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

VARIABLE = "MIXORA_LIFELINE"
"""Where a process finds the file descriptor of its end."""


def start(command: Sequence[str], environment: Mapping[str, str], **settings: Any) -> "subprocess.Popen[bytes]":
    """A process that can `hold_on` to this one, in a session of its own; `settings` are those of `subprocess.Popen`.

    In a session of its own, a terminal's Ctrl-C reaches it through this process alone.
    """
    end = _make()
    found = {**environment, VARIABLE: str(end)}
    return subprocess.Popen(command, env=found, pass_fds=[end], start_new_session=True, **settings)


def hold_on() -> None:
    """Send SIGTERM to this process once the one that started it is gone; nothing where that one has no lifeline."""
    told = os.environ.pop(VARIABLE, "")
    if told:
        threading.Thread(target=_wait, args=(int(told),), name="lifeline", daemon=True).start()


@cache
def _make() -> int:
    """The end for others; ours is never closed by hand."""
    theirs, _ = os.pipe()
    return theirs


def _wait(end: int) -> None:
    os.read(end, 1)
    os.kill(os.getpid(), signal.SIGTERM)
