"""The command `bench`: benchmarks, which come with the repository and are run from a checkout of it."""

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import mixora
from mixora.commands.terminal import Debug, reports_errors
from mixora.display.console import Console

LISTED = (None, "--help")


def import_benchmarks() -> Any:
    """The package `benchmarks` of the checkout that this source lies in, else of the working directory's.

    Raises `ConfigError` outside of a checkout.
    """
    from mixora.errors import ConfigError

    for root in (Path(__file__).parents[3], Path.cwd()):
        if (root / "benchmarks" / "measuring.py").is_file() and (root / "src" / "mixora").is_dir():
            sys.path.insert(0, str(root))
            return importlib.import_module("benchmarks")
    raise ConfigError(
        "bench: there are no benchmarks here, since they come with the repository, not with the package; "
        "valid: in a checkout of mixora, the folder with benchmarks/ and src/mixora/"
    )


def complete_benchmark(incomplete: str) -> list[str]:
    """Names of benchmarks, where there are any."""
    from mixora.errors import ConfigError

    try:
        return [name for name in import_benchmarks().BENCHMARKS if name.startswith(incomplete)]
    except ConfigError:
        return []


@reports_errors
def bench(
    context: typer.Context,
    name: Annotated[
        str | None, typer.Argument(help="Which one; without it, all are listed.", autocompletion=complete_benchmark)
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure time and memory; `mixora bench NAME --help` lists the options of a benchmark."""
    from mixora.config import did_you_mean
    from mixora.errors import ConfigError

    table = import_benchmarks().BENCHMARKS
    if name in LISTED:
        listing = Table("benchmark", "what it measures")
        for known, benchmark in table.items():
            listing.add_row(known, benchmark.line)
        Console().print(listing)
        Console().print("mixora bench NAME [OPTIONS]; mixora bench NAME --help lists the options")
        return
    if name not in table:
        raise ConfigError(f"bench: got {name!r}; valid: a benchmark{did_you_mean(str(name), table)}")
    # benchmarks use mixora as a user's program does
    mixora.import_face()
    importlib.import_module("benchmarks.running").run(name, context.args)
