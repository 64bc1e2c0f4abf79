"""Commands that look before anything is trained: recipes, plan."""

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mixora.commands.completion import complete_recipe
from mixora.commands.terminal import (
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
from mixora.display.console import Console

if TYPE_CHECKING:
    from mixora.training.planning import Outlook

# of the fields of `Memory`, in their order, and of what is sent
HEADINGS = ("base", "adapter", "grads", "optim", "buffers", "activ", "peak", "logits", "sent")
LARGE = 10 * 2**30


Batch = Annotated[int, typer.Option(help="Rows of a batch, for the memory estimate.", min=1)]
Length = Annotated[int | None, typer.Option(help="Tokens of a row; 512, or what the base takes.", min=1)]
Processes = Annotated[int, typer.Option(help="How many processes train together, a GPU each.", min=1)]
Strategies = Annotated[
    list[str] | None,
    typer.Option(help="How they share the work: ddp, fsdp2, zero2, zero3; may be given again. All, if not given."),
]
Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Keep the input of each block only, and run it again.")
]


@reports_errors
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe whole.", autocompletion=complete_recipe)] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """List the named methods, or show one with all its settings."""
    from mixora.files.documents import write_yaml
    from mixora.recipes import read_recipe, recipe_names

    if name is not None:
        data = read_recipe(name).model_dump(mode="json")
        print_json(data) if as_json else sys.stdout.write(write_yaml(data))
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
    batch: Batch = 8,
    length: Length = None,
    processes: Processes = 1,
    strategy: Strategies = None,
    gradient_checkpointing: Checkpointing = False,
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
            tree, batch, length, processes=processes, strategies=strategy or (), recomputes=gradient_checkpointing
        )
    if as_json:
        print_json(_as_data(outlook))
        return
    print_plan(outlook.plan, full)
    of = outlook.parameters
    console = Console()
    console.print(f"base: {of.base:,} parameters, {of.active_base:,} of them for each token")
    console.print(_tabulate(outlook, batch))
    console.print("peak: the most at once; logits: where the loss is not fused with the head")


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
    rows = [
        [*vars(each.memory).values(), *([each.traffic.total] if processes > 1 else [])] for each in outlook.footprints
    ]
    unit, size = ("GiB", 2**30) if max(max(filter(None, row)) for row in rows) >= LARGE else ("MiB", 2**20)
    title = f"a step on {processes} process(es), each {batch} rows of {outlook.length} tokens, in {unit}"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    # no wider than terminals are: what is cut off is no number
    for name in ("by", *HEADINGS[: len(rows[0])]):
        table.add_column(name, justify="left" if name == "by" else "right", no_wrap=True)
    for each, row in zip(outlook.footprints, rows, strict=True):
        table.add_row(each.strategy, *(_write_size(number, size) for number in row))
    return table


def _write_size(number: int | None, unit: int) -> str:
    if number is None:
        return "\N{EN DASH}"
    return f"{number / unit:,.1f}" if number < 1000 * unit else f"{number / unit:,.0f}"
