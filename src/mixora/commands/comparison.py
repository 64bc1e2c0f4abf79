"""The command `compare`: methods × seeds × data sets at equal parameters."""

import shlex
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixora.commands.terminal import AsJson, Debug, DryRun, Out, make_console, print_json, read_tree, reports_errors

if TYPE_CHECKING:
    from mixora.comparison.matrix import Matrix, Run
    from mixora.comparison.queue import Launcher
    from mixora.comparison.results import Results
    from mixora.training.progress import Progress


class Launchers(StrEnum):
    """Where runs are made."""

    local = "local"
    ray = "ray"


Compared = Annotated[
    list[str], typer.Argument(metavar="COMPARE.YAML [KEY=VALUE]...", help="What to compare, then changes to it.")
]
Workers = Annotated[int | None, typer.Option(min=1, help="Runs at a time; one per GPU, or one.")]
Devices = Annotated[str | None, typer.Option(help="GPUs to use, such as 0,1; all that are visible.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of a run; the cores divided by the workers.")]
Where = Annotated[Launchers, typer.Option(help="This machine, or an existing Ray cluster.")]
Address = Annotated[str, typer.Option(help="Of the Ray cluster; auto: the one this machine is part of.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Make finished runs again where their settings have changed.")
]


@reports_errors
def compare(
    settings: Compared,
    out: Out = None,
    workers: Workers = None,
    devices: Devices = None,
    threads: Threads = None,
    launcher: Where = Launchers.local,
    address: Address = "auto",
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare methods over seeds at equal parameters. Stopped and started again, it makes the runs that are missing."""
    from mixora.comparison.matrix import make_matrix
    from mixora.comparison.queue import find_missing, work_through
    from mixora.comparison.report import show_matrix
    from mixora.comparison.results import gather
    from mixora.comparison.settings import read_comparison
    from mixora.errors import TrainingError
    from mixora.training.progress import Progress

    progress = Progress(make_console(as_json))
    matrix = make_matrix(read_comparison(read_tree(settings, out=out)))
    missing = find_missing(matrix, overwrite)
    for part in show_matrix(matrix, [run.name for run in missing]):
        progress.show(part)
    if dry_run:
        if as_json:
            print_json(_describe_plan(matrix, missing))
        return
    options = {"workers": workers, "threads": threads}
    problems = work_through(matrix, missing, lambda: _make(launcher, options, devices, address), progress)
    results = gather(matrix, problems)
    _report(results, progress, as_json)
    if problems:
        raise TrainingError(
            f"{len(problems)} of {len(matrix.runs)} runs failed: {', '.join(problems)}; their logs lie in "
            f"{matrix.comparison.out}/queue; the same command makes them again and keeps the others"
        )


def _report(results: "Results", progress: "Progress", as_json: bool) -> None:
    from mixora.comparison.report import summarise, write_results

    page = write_results(results, shlex.join(["mixora", *sys.argv[1:]]))
    for part in summarise(results):
        progress.show(part)
    progress.console.print(f"page  {page}", highlight=False, soft_wrap=True)
    if as_json:
        print_json(results.to_dict())


def _make(launcher: Launchers, options: dict[str, Any], devices: str | None, address: str) -> "Launcher":
    from mixora.comparison.cluster import make_cluster
    from mixora.comparison.local import make_local
    from mixora.errors import ConfigError

    if launcher is Launchers.local:
        return make_local(**options, devices=devices)
    if devices is not None:
        raise ConfigError("devices: has no effect with --launcher ray, which places runs itself; valid: without it")
    return make_cluster(address, **options)


def _describe_plan(matrix: "Matrix", missing: Sequence["Run"]) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "matched": {
            data: [{**asdict(method), "adapter": method.adapter.model_dump()} for method in methods.values()]
            for data, methods in matrix.matched.items()
        },
        "runs": [run.name for run in matrix.runs],
        "missing": [run.name for run in missing],
    }
