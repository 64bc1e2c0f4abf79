"""`python -m mixora`: what launchers start, since they take a module."""

import os
import sys

from mixora.cli import main


def end_at_once(code: int) -> None:
    """Without destructors: DDP's holds the interpreter's lock while it joins a thread that may wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if "RANK" in os.environ:
            end_at_once(end.code if isinstance(end.code, int) else 0)
        raise
