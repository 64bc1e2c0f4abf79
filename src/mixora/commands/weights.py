"""Commands that make one folder of weights from another: craft, convert, export."""

from pathlib import Path
from typing import Annotated

import typer

from mixora.completion import complete_destination, complete_recipe, complete_run
from mixora.terminal import (
    AsJson,
    Changes,
    Data,
    Debug,
    DryRun,
    Model,
    Overwrite,
    Settings,
    make_console,
    print_json,
    print_plan,
    read_tree,
    reports_errors,
    tell_written,
)


@reports_errors
def craft(
    settings: Settings = None,
    model: Model = None,
    out: Annotated[
        str, typer.Option(help="The folder of the adapter; new or empty, or with --overwrite one that mixora wrote.")
    ] = "runs/crafted",
    recipe: Annotated[
        str,
        typer.Option(help="A method; see `mixora recipes`. Short for adapter.recipe=…", autocompletion=complete_recipe),
    ] = "pesc",
    seed: Annotated[int, typer.Option(help="Of the draw of the experts.", min=0, max=2**32 - 1)] = 0,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make a dense model sparse: write an adapter with which it computes what it did, until it is trained."""
    from mixora.training.planning import craft_adapter
    from mixora.training.progress import Progress

    tree = read_tree(settings, adapter__recipe=recipe, model__base=model)
    stage = Progress(make_console(as_json)).task
    table = craft_adapter(tree, out, seed, overwrite=overwrite, dry_run=dry_run, progress=stage)
    if as_json:
        print_json({"sites": table.to_list(), "notes": table.notes, "adapter": out, "written": not dry_run})
        return
    print_plan(table)
    tell_written({"adapter": out}, dry_run)


@reports_errors
def convert(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a model or an adapter.")],
    out: Annotated[
        Path,
        typer.Option(help="The folder of what is written; new or empty, or with --overwrite one that mixora wrote."),
    ],
    model: Annotated[
        str | None, typer.Option(help="The base of a MoE-PEFT adapter, where it is not the one that the adapter names.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Read a released Camelidae, Qwen2idae or Sparsetral model, or a MoLA or MixLoRA adapter of MoE-PEFT."""
    from mixora.conversion import convert as convert_checkpoint
    from mixora.training.progress import Progress

    stage = Progress(make_console(as_json)).task
    table = convert_checkpoint(checkpoint, out, model, overwrite=overwrite, dry_run=dry_run, progress=stage)
    # an adapter of MoE-PEFT comes without its base
    base = out / "base" if (checkpoint / "config.json").is_file() else None
    if as_json:
        print_json({"sites": table.to_list(), "base": base, "adapter": out / "adapter", "written": not dry_run})
        return
    print_plan(table)
    tell_written({"base": base or "not written: it stays where it is", "adapter": out / "adapter"}, dry_run)


@reports_errors
def export(
    adapter: Annotated[
        Path,
        typer.Argument(
            metavar="ADAPTER", help="The folder of a run, or of a saved adapter.", autocompletion=complete_run
        ),
    ],
    to: Annotated[
        str,
        typer.Option(
            help="peft-lora, dense, standalone, averaged, adapter (mixora's own), or hub.",
            autocompletion=complete_destination,
        ),
    ],
    settings: Changes = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of the result; new or empty, or with --overwrite one that mixora wrote."),
    ] = None,
    model: Model = None,
    rank: Annotated[
        int | None, typer.Option(help="Of the LoRA; what it has, or for routed sites the ranks a token uses.")
    ] = None,
    uniform_rank: Annotated[
        bool,
        typer.Option("--uniform-rank", help="One rank for all modules, by rows of zeros: what servers of LoRA ask."),
    ] = False,
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
    repo: Annotated[str | None, typer.Option(help="With --to hub: the repository, OWNER/NAME.")] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="With --to hub: what goes there, one of the other forms; adapter unless told.",
            autocompletion=complete_destination,
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="With --to hub: a new repository is private.")] = False,
    base_id: Annotated[str | None, typer.Option(help="What the result calls its base: OWNER/NAME on the hub.")] = None,
    licence: Annotated[str | None, typer.Option(help="Of the result, for its card; apache-2.0, mit, ...")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Bring an adapter where it is needed: one LoRA, a dense model, a model without mixora, or the hub; with a card."""
    from mixora.commands.destinations import Destination, export_to_folder, export_to_hub
    from mixora.errors import ConfigError
    from mixora.exporting import Options
    from mixora.training.merging import FIT_ROWS

    if fit_rows is not None and not approximate:
        raise ConfigError("fit_rows: an exact export looks at no rows; valid: with --approximate")
    rows = (FIT_ROWS if fit_rows is None else fit_rows) if approximate else None
    changes = read_tree(settings, model__base=model, data__source=data)
    destination = Destination(
        adapter, changes, Options(rank, uniform_rank, soup, rows), base_id, licence, overwrite, dry_run, as_json
    )
    if to == "hub":
        export_to_hub(destination, repo, form or "adapter", private, out)
    else:
        export_to_folder(destination, out, to, {"repo": repo, "form": form, "private": private})
