"""Commands that make a run or look at one: train, evaluate, generate, inspect."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from mixora.completion import complete_run
from mixora.console import Console
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
    skip_bad_steps: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=0, help="Leave out up to N steps that are not finite. Short for train.skip_bad_steps=…"
        ),
    ] = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, evaluate before and after, save the adapter, read it back, write a report."""
    from mixora.training.checkpoints import clear_leftovers, read_resumed
    from mixora.training.progress import Progress
    from mixora.training.rehearsal import rehearse
    from mixora.training.results import summarise_run
    from mixora.training.run import fit
    from mixora.training.run_config import read_run

    short = {"adapter__recipe": recipe, "model__base": model, "data__source": data, "out": out}
    tree = read_tree(settings, **short, train__skip_bad_steps=skip_bad_steps)
    if resume is not None and overwrite:
        raise ConfigError("overwrite: would remove the run that --resume goes on with; valid: one of the two")
    if resume is not None and not dry_run:
        clear_leftovers(resume)
    config = read_run(tree) if resume is None else read_resumed(resume, tree)
    console = make_console(as_json)
    if dry_run:
        rehearsal = rehearse(config, overwrite, resume is not None)
        if as_json:
            print_json(rehearsal.to_dict())
        for part in rehearsal.lines():
            console.print(part)
        return
    record = fit(config, Progress(console), overwrite, resume is not None)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(record))
        return
    for part in summarise_run(record, Path(config.out)):
        console.print(part)


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
            Console().print(f"{name:>10}  ", end="", style="bold")
            Console().print(text, highlight=False)


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
