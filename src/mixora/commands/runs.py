"""Commands that look at a run: evaluate, generate, inspect."""

import sys
from typing import Annotated

import typer

from mixora.commands.terminal import (
    AsJson,
    Changes,
    Data,
    Debug,
    Run,
    make_console,
    print_json,
    read_tree,
    reports_errors,
)
from mixora.display.console import Console
from mixora.errors import DataError

Task = Annotated[list[str] | None, typer.Option(help="Only this task of several; may be given several times.")]


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
    from mixora.training.results import reopen
    from mixora.training.summaries import metrics_table

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
    from mixora.training.results import reopen
    from mixora.training.summaries import residual_table, routing_table

    trained = reopen(run, read_tree(settings, data__source=data), Progress(make_console(as_json)), task or ())
    sites = trained.residual_energy() if residual else trained.inspect()
    table = residual_table if residual else routing_table
    print_json(sites) if as_json else Console().print(table(sites))
