"""Commands that make one folder of weights from another: craft, convert, merge."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mixora.terminal import (
    AsJson,
    Data,
    Debug,
    Model,
    Settings,
    make_console,
    print_json,
    print_plan,
    read_tree,
    reports_errors,
)


@reports_errors
def craft(
    settings: Settings = None,
    model: Model = None,
    out: Annotated[str, typer.Option(help="The folder of the adapter; new or empty.")] = "runs/crafted",
    recipe: Annotated[str, typer.Option(help="A method; see `mixora recipes`. Short for adapter.recipe=…")] = "pesc",
    seed: Annotated[int, typer.Option(help="Of the draw of the experts.")] = 0,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a dense model sparse: write an adapter with which it computes what it did, until it is trained."""
    from mixora.training.planning import craft_adapter

    table = craft_adapter(read_tree(settings, adapter__recipe=recipe, model__base=model), out, seed)
    if as_json:
        print_json({"sites": table.to_list(), "notes": table.notes, "adapter": out})
        return
    print_plan(table)
    Console().print(f"adapter  {out}")


@reports_errors
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a model or an adapter.")],
    out: Annotated[Path, typer.Option(help="The folder of what is written; new or empty.")],
    model: Annotated[
        str | None, typer.Option(help="The base of a MoE-PEFT adapter, where it is not the one that the adapter names.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read a released Camelidae, Qwen2idae or Sparsetral model, or a MoLA or MixLoRA adapter of MoE-PEFT."""
    from mixora.conversion import convert as convert_checkpoint

    table = convert_checkpoint(checkpoint, out, model)
    # an adapter of MoE-PEFT comes without its base
    base = out / "base" if (out / "base").is_dir() else None
    if as_json:
        print_json({"sites": table.to_list(), "base": base, "adapter": out / "adapter"})
        return
    print_plan(table)
    Console().print(f"base     {base or 'not written: it stays where it is'}\nadapter  {out / 'adapter'}")


@reports_errors
def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of a run, or of a saved adapter.")],
    out: Annotated[Path, typer.Option(help="The folder of the result; new or empty.")],
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the run.")] = None,
    model: Model = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the LoRA; what it has, or for routed sites the ranks a token uses.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Write a dense model instead of an adapter.")] = False,
    soup: Annotated[
        bool, typer.Option("--soup", help="Where experts are drawn, average only those that lower the held-out loss.")
    ] = False,
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Where experts are routed by the input, the nearest LoRA on data.")
    ] = False,
    fit_rows: Annotated[
        int | None, typer.Option(help="Training rows that --approximate fits on; 256 unless told.")
    ] = None,
    data: Data = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Turn a mixture into an ordinary LoRA adapter that plain PEFT reads, or into a dense model."""
    from mixora.errors import ConfigError
    from mixora.training.merging import FIT_ROWS, merge_folder, summarise_merge
    from mixora.training.progress import Progress

    if fit_rows is not None and not approximate:
        raise ConfigError("fit_rows: an exact merge looks at no rows; valid: with --approximate")
    changes = read_tree(settings, model__base=model, data__source=data)
    console = make_console(as_json)
    rows = (FIT_ROWS if fit_rows is None else fit_rows) if approximate else None
    merged = merge_folder(adapter, out, changes, Progress(console), rank=rank, dense=dense, soup=soup, fit_rows=rows)
    for part in summarise_merge(merged):
        console.print(part)
    if as_json:
        print_json(merged.to_dict())
