"""Commands that look before anything is trained: recipes, plan."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from mixora.completion import complete_recipe
from mixora.console import Console
from mixora.terminal import (
    AsJson,
    Debug,
    Model,
    Recipe,
    Settings,
    make_console,
    print_json,
    print_plan,
    read_tree,
    reports_errors,
)

if TYPE_CHECKING:
    from mixora.training.planning import Outlook


@reports_errors
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe whole.", autocompletion=complete_recipe)] = None,
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


@reports_errors
def plan(
    settings: Settings = None,
    recipe: Recipe = None,
    model: Model = None,
    batch: Annotated[int, typer.Option(help="Rows of a batch, for the memory estimate.", min=1)] = 8,
    length: Annotated[int | None, typer.Option(help="Tokens of a row; 512, or what the base takes.", min=1)] = None,
    processes: Annotated[int, typer.Option(help="How many processes train together, a GPU each.", min=1)] = 1,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="How they share the work: ddp, fsdp2, zero2, zero3; may be given again. All, if not given."),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Keep the input of each block only, and run it again.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="One line for every site, not for every kind.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the table of sites, memory and traffic of a training step. Loads no weights and trains nothing.

    --batch is that of each process. MODEL may be a folder that holds nothing but a config.json.
    """
    from mixora.training.planning import plan_without_weights
    from mixora.training.progress import Progress

    tree = read_tree(settings, adapter__recipe=recipe, model__base=model)
    with Progress(make_console(as_json)).task("planning"):
        outlook = plan_without_weights(
            tree,
            batch,
            length,
            processes=processes,
            strategies=strategy or (),
            recomputes=gradient_checkpointing,
        )
    if as_json:
        print_json(_as_data(outlook))
        return
    print_plan(outlook.plan, full)
    of = outlook.parameters
    console = Console()
    console.print(f"base: {of.base:,} parameters, {of.active_base:,} of them for each token")
    console.print(_tabulate(outlook, batch))
    console.print("peak: the most at once; with logits: where the loss is not fused with the head")


def _as_data(outlook: "Outlook") -> dict[str, Any]:
    footprints = [asdict(footprint) for footprint in outlook.footprints]
    return {
        "sites": outlook.plan.to_list(),
        "notes": outlook.plan.notes,
        "parameters": asdict(outlook.parameters),
        "length": outlook.length,
        "memory_bytes": footprints[0]["memory"],
        "footprints": footprints,
    }


def _tabulate(outlook: "Outlook", batch: int) -> Table:
    """Memory by part, and what is sent, of each strategy."""
    processes = outlook.footprints[0].processes
    table = Table(title=f"a step on {processes} process(es), each {batch} rows of {outlook.length} tokens, in MiB")
    parts = list(vars(outlook.footprints[0].memory))
    for column in ("strategy", *parts, *(["sent"] if processes > 1 else [])):
        table.add_column(
            column.removeprefix("peak_").replace("_", " "), justify="left" if column == "strategy" else "right"
        )
    for footprint in outlook.footprints:
        sizes = list(vars(footprint.memory).values()) + ([footprint.traffic.total] if processes > 1 else [])
        table.add_row(footprint.strategy, *(f"{(size or 0) / 2**20:,.0f}" for size in sizes))
    return table
