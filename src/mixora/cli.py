"""The command line. Heavy libraries are imported by the commands that need them, so that help is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mixora.bench import bench
from mixora.commands import convert, craft, merge
from mixora.terminal import (
    AsJson,
    Data,
    Debug,
    Model,
    Out,
    Recipe,
    Run,
    Settings,
    make_console,
    print_json,
    print_plan,
    read_tree,
    reports_errors,
)

TUTORIAL = """Fine-tune Hugging Face models with mixtures of adapters.

A first run, on a model and rows of your own:

\b
  mixora recipes                                  which methods there are
  mixora plan --recipe sira --model MODEL         what would be trained, and its memory
  mixora train --recipe sira --model MODEL --data rows.jsonl --out runs/first
  mixora generate runs/first --prompt "Hello"     ask the trained model
  mixora evaluate runs/first                      its metrics on held-out rows
  mixora inspect runs/first                       what its routers do

A sparse model:

\b
  mixora craft --model DENSE --out DIR            make a dense model sparse (PESC); it computes what it did
  mixora convert CHECKPOINT --out DIR             read a released Camelidae, Qwen2idae or Sparsetral model

An adapter of other code:

\b
  mixora convert ADAPTER --model MODEL --out DIR  read a MoLA or MixLoRA adapter of MoE-PEFT

A mixture as an ordinary LoRA adapter, or with --dense as a dense model:

\b
  mixora merge runs/first --out DIR               exact where nothing is routed by the input; else --approximate

Time and memory, in a checkout of the repository:

\b
  mixora bench                                    which benchmarks there are
  mixora bench step                               a training step, against PEFT's LoRA

MODEL is a folder, a GGUF file, a hub id, or a short name such as smollm2-135m-instruct. Rows are JSON lines with
prompt and completion; messages; text; text and label; or question, choices and answer.

Any setting can follow as key=value: train.steps=200 adapter.rank=8 data.max_length=256. The same settings can stand
in a file: mixora train run.yaml train.steps=200

Exit codes: 0 done, 1 a fault in mixora, 2 a mistake in what was asked.
"""

app = typer.Typer(help=TUTORIAL, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
@reports_errors
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe whole.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the named methods, or show one with all its settings."""
    import yaml

    from mixora.recipes import read_recipe, recipe_names

    if name is not None:
        data = read_recipe(name).model_dump(mode="json")
        print_json(data) if as_json else sys.stdout.write(yaml.safe_dump(data, sort_keys=False, allow_unicode=True))
        return
    found = {known: read_recipe(known) for known in recipe_names()}
    if as_json:
        print_json({known: {"paper": r.paper, "about": r.about} for known, r in found.items()})
        return
    table = Table("recipe", "what it is", "paper")
    for known, recipe in found.items():
        table.add_row(known, recipe.about, recipe.paper)
    Console().print(table)


@app.command()
@reports_errors
def plan(
    settings: Settings = None,
    recipe: Recipe = None,
    model: Model = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch, for the memory estimate.")] = 8,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; 512, or what the base takes.")] = None,
    full: Annotated[bool, typer.Option("--full", help="One line for every site, not for every kind.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the table of sites and an estimate of memory. Loads no weights and trains nothing."""
    from mixora.training.planning import plan_without_weights

    tree = read_tree(settings, adapter__recipe=recipe, model__base=model)
    table, memory, length = plan_without_weights(tree, batch, length)
    if as_json:
        print_json({"sites": table.to_list(), "notes": table.notes, "memory_bytes": memory})
        return
    print_plan(table, full)
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.0f}" for name, size in memory.items())
    Console().print(f"memory of a step, {batch} rows of {length} tokens, in MiB: {parts}")


@app.command()
@reports_errors
def train(
    settings: Settings = None,
    recipe: Recipe = None,
    model: Model = None,
    data: Data = None,
    out: Out = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an earlier run left in `out`.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Fine-tune, evaluate before and after, save the adapter, read it back, write a report."""
    from mixora.training.progress import Progress
    from mixora.training.results import summarise_run
    from mixora.training.run import fit
    from mixora.training.run_config import read_run

    tree = read_tree(settings, adapter__recipe=recipe, model__base=model, data__source=data, out=out)
    config = read_run(tree)
    console = make_console(as_json)
    record = fit(config, Progress(console), overwrite)
    if as_json:
        from dataclasses import asdict

        print_json(asdict(record))
        return
    for part in summarise_run(record, Path(config.out)):
        console.print(part)


@app.command()
@reports_errors
def evaluate(
    run: Run,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the run.")] = None,
    data: Data = None,
    split: Annotated[str | None, typer.Option(help="Which rows. Short for data.evaluation_split=…")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a trained adapter on held-out rows."""
    from mixora.training.progress import Progress
    from mixora.training.results import reopen

    changes = read_tree(settings, data__source=data, data__evaluation_split=split)
    trained = reopen(run, changes, Progress(make_console(as_json)))
    metrics = trained.measure()
    if as_json:
        print_json(metrics)
        return
    table = Table("metric", "value", title=f"{run} on {trained.material.evaluation_rows.origin}")
    for name, value in metrics.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    Console().print(table)


@app.command()
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
    from mixora.errors import DataError
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


@app.command()
@reports_errors
def inspect(
    run: Run,
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the run.")] = None,
    data: Data = None,
    residual: Annotated[
        bool, typer.Option("--residual", help="How far experts behind modules (pesc) are from full ones, instead.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show what each router does with held-out rows: load per expert, experts per token, entropy, dropped and dead."""
    from mixora.training.progress import Progress
    from mixora.training.results import reopen, residual_table, routing_table

    trained = reopen(run, read_tree(settings, data__source=data), Progress(make_console(as_json)))
    sites = trained.residual_energy() if residual else trained.inspect()
    table = residual_table if residual else routing_table
    print_json(sites) if as_json else Console().print(table(sites))


for command in (craft, convert, merge):
    app.command()(command)
# a benchmark reads its own options, --help among them
app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(bench)


def main() -> None:
    """Entry point of the `mixora` script."""
    app()


if __name__ == "__main__":
    main()
