"""The command `train`: a run from data to report, in one process or several."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from mixora.commands.completion import complete_run
from mixora.commands.terminal import (
    AsJson,
    Data,
    Debug,
    DryRun,
    Model,
    Out,
    Overwrite,
    Recipe,
    Settings,
    make_console,
    print_json,
    read_tree,
    reports_errors,
)
from mixora.display.console import Console
from mixora.errors import ConfigError

if TYPE_CHECKING:
    from mixora.diagnostics.record import RunRecord
    from mixora.training.launcher import Places
    from mixora.training.run_config import RunConfig

Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN", help="Go on with an interrupted run, from its newest checkpoint.", autocompletion=complete_run
    ),
]
SkipBadSteps = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=0, help="Leave out up to N steps that are not finite. Short for train.skip_bad_steps=…"
    ),
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Train with so many processes on this machine, one for each GPU.")
]
Nodes = Annotated[int, typer.Option(min=1, help="Machines that train together; start this on each.")]
NodeRank = Annotated[int, typer.Option(min=0, help="Which of the machines this is, from 0 on.")]
Address = Annotated[str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 waits for the others.")]


@reports_errors
def train(
    settings: Settings = None,
    recipe: Recipe = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Resume = None,
    skip_bad_steps: SkipBadSteps = None,
    processes: Processes = None,
    nodes: Nodes = 1,
    node_rank: NodeRank = 0,
    address: Address = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, evaluate before and after, save the adapter, read it back, write a report."""
    from mixora.training.launcher import choose_places
    from mixora.training.lifeline import hold_on
    from mixora.training.progress import Progress
    from mixora.training.run import fit

    hold_on()
    places = choose_places(processes, nodes, node_rank, address)
    changes = {"adapter__recipe": recipe, "model__base": model, "data__source": data, "out": out}
    tree = read_tree(settings, **changes, train__skip_bad_steps=skip_bad_steps)
    if dry_run:
        _rehearse(_read_config(tree, overwrite, resume), overwrite, resume is not None, as_json)
        return
    _clear(resume)
    config = _read_config(tree, overwrite, resume)
    if places is not None:
        flags = {"overwrite": overwrite, "json": as_json, "debug": debug}
        values = {"recipe": recipe, "model": model, "data": data, "out": out, "resume": resume}
        _launch(places, settings or [], flags, values | {"skip-bad-steps": skip_bad_steps})
    record = fit(config, Progress(make_console(as_json)), overwrite, resume is not None)
    if record is not None:
        _show(record, config, as_json)


def _clear(resume: Path | None) -> None:
    from mixora.training.checkpoints import clear_leftovers
    from mixora.training.processes import is_started_first

    if resume is not None and is_started_first():
        clear_leftovers(resume)


def _read_config(tree: Mapping[str, Any], overwrite: bool, resume: Path | None) -> "RunConfig":
    from mixora.training.checkpoints import read_resumed
    from mixora.training.run_config import read_run

    if resume is not None and overwrite:
        raise ConfigError("overwrite: would remove the run that --resume goes on with; valid: one of the two")
    return read_run(tree) if resume is None else read_resumed(resume, tree)


def _rehearse(config: "RunConfig", overwrite: bool, resume: bool, as_json: bool) -> None:
    from mixora.training.rehearsal import rehearse

    rehearsal = rehearse(config, overwrite, resume)
    if as_json:
        print_json(rehearsal.to_dict())
        return
    for part in rehearsal.lines():
        Console().show(part)


def _launch(places: "Places", words: list[str], flags: Mapping[str, bool], values: Mapping[str, Any]) -> NoReturn:
    """Ends with the exit code of the processes, each of which runs this command without the options for places."""
    from mixora.training.launcher import launch

    options = [f"--{name}" for name, is_given in flags.items() if is_given]
    options += [f"--{name}={value}" for name, value in values.items() if value is not None]
    tell = partial(Console(stderr=True).print, highlight=False, soft_wrap=True)
    raise SystemExit(launch([sys.executable, "-m", "mixora", "train", *words, *options], places, tell))


def _show(record: "RunRecord", config: "RunConfig", as_json: bool) -> None:
    from mixora.training.summaries import summarise_run

    if as_json:
        print_json(asdict(record))
        return
    for part in summarise_run(record, Path(config.out)):
        Console().show(part)
