"""Commands that make a run or look at one: train, evaluate, generate, inspect."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

from mixora.completion import complete_run
from mixora.errors import ConfigError, DataError
from mixora.terminal import (
    AsJson,
    Changes,
    Data,
    Debug,
    DryRun,
    Model,
    Out,
    Overwrite,
    Recipe,
    Run,
    Settings,
    make_console,
    print_json,
    read_tree,
    reports_errors,
)

if TYPE_CHECKING:
    from mixora.training.launcher import Places

Task = Annotated[list[str] | None, typer.Option(help="Only this task of several; may be given several times.")]


@reports_errors
def train(
    settings: Settings = None,
    recipe: Recipe = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with an interrupted run, from its newest checkpoint.",
            autocompletion=complete_run,
        ),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Train with so many processes on this machine, one for each GPU.")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that train together; start this on each.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of the machines this is, from 0 on.")] = 0,
    address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where machine 0 waits for the others.")
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, evaluate before and after, save the adapter, read it back, write a report."""
    from mixora.training.checkpoints import read_resumed
    from mixora.training.launcher import Places
    from mixora.training.progress import Progress
    from mixora.training.rehearsal import rehearse
    from mixora.training.results import summarise_run
    from mixora.training.run import fit
    from mixora.training.run_config import read_run

    tree = read_tree(settings, adapter__recipe=recipe, model__base=model, data__source=data, out=out)
    if resume is not None and overwrite:
        raise ConfigError("overwrite: would remove the run that --resume goes on with; valid: one of the two")
    config = read_run(tree) if resume is None else read_resumed(resume, tree)
    console = make_console(as_json)
    if processes is None and (nodes, node_rank, address) != (1, 0, None):
        raise ConfigError("nodes, node-rank, address: have no effect without --processes; valid: with it")
    if processes is not None and not dry_run:
        options = {"overwrite": overwrite, "json": as_json, "debug": debug, "resume": resume}
        short = {"recipe": recipe, "model": model, "data": data, "out": out}
        _launch(Places(processes, nodes, node_rank, address), settings or [], options | short)
    if dry_run:
        rehearsal = rehearse(config, overwrite, resume is not None)
        if as_json:
            print_json(rehearsal.to_dict())
        for part in rehearsal.lines():
            console.print(part)
        return
    record = fit(config, Progress(console), overwrite, resume is not None)
    if record is None:
        return
    if as_json:
        from dataclasses import asdict

        print_json(asdict(record))
        return
    for part in summarise_run(record, Path(config.out)):
        console.print(part)


def _launch(places: "Places", words: list[str], options: Mapping[str, Any]) -> NoReturn:
    """Ends with the exit code of the processes, each of which runs this command without the options for places."""
    from mixora.training.launcher import launch

    places.check()
    flags = [f"--{name}" for name, value in options.items() if value is True]
    values = [f"--{name}={value}" for name, value in options.items() if value not in (True, False, None)]
    tell = partial(Console(stderr=True).print, markup=False, highlight=False, soft_wrap=True)
    raise SystemExit(launch([sys.executable, "-m", "mixora", "train", *words, *flags, *values], places, tell))


@reports_errors
def evaluate(
    run: Run,
    settings: Changes = None,
    data: Data = None,
    split: Annotated[str | None, typer.Option(help="Which rows. Short for data.evaluation_split=…")] = None,
    task: Task = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a trained adapter on held-out rows."""
    from mixora.training.progress import Progress
    from mixora.training.results import metrics_table, reopen

    changes = read_tree(settings, data__source=data, data__evaluation_split=split)
    trained = reopen(run, changes, Progress(make_console(as_json)), task or ())
    metrics = trained.measure()
    if as_json:
        print_json(metrics)
        return
    origins = ", ".join(rows.evaluation.origin for rows in trained.material.tasks.values())
    Console().print(metrics_table(f"{run} on {origins}", metrics))


@reports_errors
def generate(
    run: Run,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to ask; may be given several times. Else standard input, a prompt a line."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    sample: Annotated[bool, typer.Option("--sample", help="Draw tokens instead of taking the likeliest.")] = False,
    compare: Annotated[bool, typer.Option("--compare", help="Show the base model's answer too.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Ask a trained model."""
    from mixora.training.progress import Progress
    from mixora.training.results import reopen

    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise DataError("there is no prompt; valid: --prompt TEXT, or a prompt a line on standard input")
    trained = reopen(run, {}, Progress(make_console(as_json)))
    answers = trained.answer(prompts, max_new_tokens, sample, compare)
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        for name, text in answer.items():
            Console().print(f"[bold]{name:>10}[/]  ", end="")
            Console().print(text, markup=False, highlight=False)


@reports_errors
def inspect(
    run: Run,
    settings: Changes = None,
    data: Data = None,
    task: Task = None,
    residual: Annotated[
        bool, typer.Option("--residual", help="How far experts behind modules (pesc) are from full ones, instead.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what each router does with held-out rows: load per expert, experts per token, entropy, dropped and dead."""
    from mixora.training.progress import Progress
    from mixora.training.results import reopen, residual_table, routing_table

    trained = reopen(run, read_tree(settings, data__source=data), Progress(make_console(as_json)), task or ())
    sites = trained.residual_energy() if residual else trained.inspect()
    table = residual_table if residual else routing_table
    print_json(sites) if as_json else Console().print(table(sites))
