"""Commands that look before anything is trained: recipes, plan."""

import sys
from typing import Annotated

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
    full: Annotated[bool, typer.Option("--full", help="One line for every site, not for every kind.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print the table of sites and an estimate of memory. Loads no weights and trains nothing."""
    from mixora.training.planning import plan_without_weights
    from mixora.training.progress import Progress

    tree = read_tree(settings, adapter__recipe=recipe, model__base=model)
    with Progress(make_console(as_json)).task("planning"):
        table, memory, length = plan_without_weights(tree, batch, length)
    if as_json:
        print_json({"sites": table.to_list(), "notes": table.notes, "memory_bytes": memory})
        return
    print_plan(table, full)
    parts = ", ".join(f"{name.replace('_', ' ')} {size / 2**20:,.0f}" for name, size in memory.items())
    Console().print(f"memory of a step, {batch} rows of {length} tokens, in MiB: {parts}")
