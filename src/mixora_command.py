"""Entry point of the `mixora` script.

A module outside of the package, whose presence tells `mixora/__init__.py` that nobody asked for the Python face: help
and shell completion then import neither torch nor PEFT.
"""


def main() -> None:
    """Run the command line."""
    from mixora.cli import main as run

    run()
