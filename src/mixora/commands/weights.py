"""Commands that make one folder of weights from another: craft, convert, export."""

from pathlib import Path
from typing import Annotated

import typer

from mixora.commands.completion import complete_destination, complete_run
from mixora.commands.terminal import (
    AsJson,
    Changes,
    Data,
    Debug,
    DryRun,
    Model,
    NewFolder,
    OptionalNewFolder,
    Overwrite,
    Recipe,
    Settings,
    make_console,
    print_json,
    print_plan,
    read_tree,
    reports_errors,
    tell_written,
)

Seed = Annotated[int, typer.Option(help="Of the draw of the experts.", min=0, max=2**32 - 1)]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="The folder of a model or an adapter.")]
OtherBase = Annotated[
    str | None, typer.Option(help="The base of a MoE-PEFT adapter, where it is not the one that the adapter names.")
]
Adapter = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="The folder of a run, or of a saved adapter.", autocompletion=complete_run),
]
To = Annotated[
    str,
    typer.Option(
        help="peft-lora, dense, standalone, averaged, adapter (mixora's own), or hub.",
        autocompletion=complete_destination,
    ),
]
Rank = Annotated[int | None, typer.Option(help="Of the LoRA; what it has, or for routed sites the ranks a token uses.")]
UniformRank = Annotated[
    bool,
    typer.Option("--uniform-rank", help="One rank for all modules, by rows of zeros: what servers of LoRA ask."),
]
Soup = Annotated[
    bool, typer.Option("--soup", help="Where experts are drawn, average only those that lower the held-out loss.")
]
Approximate = Annotated[
    bool, typer.Option("--approximate", help="Where experts are routed by the input, the nearest LoRA on data.")
]
FitRows = Annotated[int | None, typer.Option(help="Training rows that --approximate fits on; 256 unless told.")]
Repo = Annotated[str | None, typer.Option(help="With --to hub: the repository, OWNER/NAME.")]
Form = Annotated[
    str | None,
    typer.Option(
        help="With --to hub: what goes there, one of the other forms; adapter unless told.",
        autocompletion=complete_destination,
    ),
]
Private = Annotated[bool, typer.Option("--private", help="With --to hub: a new repository is private.")]
BaseId = Annotated[str | None, typer.Option(help="What the result calls its base: OWNER/NAME on the hub.")]
Licence = Annotated[str | None, typer.Option(help="Of the result, for its card; apache-2.0, mit, ...")]


@reports_errors
def craft(
    settings: Settings = None,
    model: Model = None,
    out: NewFolder = Path("runs/crafted"),
    recipe: Recipe = "pesc",
    seed: Seed = 0,
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
    checkpoint: Checkpoint,
    out: NewFolder,
    model: OtherBase = None,
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
    adapter: Adapter,
    to: To,
    settings: Changes = None,
    out: OptionalNewFolder = None,
    model: Model = None,
    rank: Rank = None,
    uniform_rank: UniformRank = False,
    soup: Soup = False,
    approximate: Approximate = False,
    fit_rows: FitRows = None,
    data: Data = None,
    repo: Repo = None,
    form: Form = None,
    private: Private = False,
    base_id: BaseId = None,
    licence: Licence = None,
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
