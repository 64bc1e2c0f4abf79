"""Run the notebooks beside this file from top to bottom, each in a kernel of its own, and tell how long each took.

Usage: python run.py [--keep]   (--keep writes the outputs into the notebooks)
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

LONGEST = 300  # seconds that a notebook may take
HERE = Path(__file__).parent


def run(path: Path, keeps_outputs: bool) -> float:
    """Seconds that the notebook took; `nbclient`'s error shows the cell that failed."""
    book = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(book, timeout=LONGEST, resources={"metadata": {"path": str(HERE)}}).execute()
    seconds = time.monotonic() - start
    if keeps_outputs:
        nbformat.write(book, path)
    return seconds


def main() -> None:
    """One line for each notebook; ends with an error where one took too long."""
    for path in sorted(HERE.glob("*.ipynb")):
        seconds = run(path, "--keep" in sys.argv)
        print(f"{path.name}: {seconds:.0f} s", flush=True)
        if seconds > LONGEST:
            sys.exit(f"{path.name}: took more than {LONGEST} s")


if __name__ == "__main__":
    main()
