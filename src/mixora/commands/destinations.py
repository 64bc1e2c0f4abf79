"""Where `mixora export` goes: a folder or the hub. Imported when the command runs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table

from mixora.commands.terminal import make_console, print_json
from mixora.display.console import Console
from mixora.errors import ConfigError
from mixora.exporting import (
    Exported,
    Options,
    Upload,
    check_login,
    check_repository,
    export_folder,
    foresee_export,
    list_upload,
    upload,
)
from mixora.merging import Merged
from mixora.training.progress import Progress
from mixora.training.summaries import summarise_foreseen, summarise_merge


@dataclass(frozen=True)
class Destination:
    """What was asked of an export, whatever it goes to."""

    adapter: Path
    changes: Mapping[str, Any]
    options: Options
    base_id: str | None
    licence: str | None
    overwrite: bool
    dry_run: bool
    as_json: bool


def export_to_folder(asked: Destination, out: Path | None, form: Any, of_hub: Mapping[str, Any]) -> None:
    """`--to` anything but hub; `of_hub`: options that would have no effect."""
    idle = [name for name, value in of_hub.items() if value]
    if idle:
        raise ConfigError(f"{', '.join(idle)}: is for the hub; valid: with --to hub")
    if out is None:
        raise ConfigError("out: is required; valid: --out DIR")
    console = make_console(asked.as_json)
    if asked.dry_run:
        foreseen = {"form": form, "options": asked.options, "overwrite": asked.overwrite}
        methods = foresee_export(asked.adapter, out, asked.changes, **foreseen)
        if asked.as_json:
            print_json({"form": form, "sites": methods, "out": out, "written": False})
        for part in summarise_foreseen(form, methods, out):
            console.show(part)
        return
    exported = _export(asked, out, form, console, overwrite=asked.overwrite)
    for part in _summarise(exported):
        console.show(part)
    if asked.as_json:
        print_json(exported.to_dict())


def export_to_hub(asked: Destination, repository: str | None, form: Any, is_private: bool, out: Path | None) -> None:
    """`--to hub`: made in a folder that is gone afterwards, and uploaded, or with `--dry-run` listed."""
    if out is not None:
        raise ConfigError("out: --to hub keeps no folder; valid: without, or another --to for a folder")
    if repository is None:
        raise ConfigError("repo: is required with --to hub; valid: --repo OWNER/NAME")
    check_repository(repository)
    if not asked.dry_run:
        check_login()
    console = make_console(asked.as_json)
    with TemporaryDirectory(prefix="mixora-") as above:
        folder = Path(above) / "export"
        _export(asked, folder, form, console, repository=repository)
        found = list_upload(folder, repository, is_private)
        address = None if asked.dry_run else upload(folder, found, asked.overwrite)
    if asked.as_json:
        print_json({**found.to_dict(), "form": form, "address": address})
    _show(found, address, console)


def _export(asked: Destination, out: Path, form: Any, console: Console, **settings: Any) -> Exported:
    named: dict[str, Any] = {"options": asked.options, "base_id": asked.base_id, "licence": asked.licence}
    return export_folder(asked.adapter, out, asked.changes, Progress(console), form=form, **named, **settings)


def _summarise(exported: Exported) -> Iterator[RenderableType]:
    if isinstance(exported.made, Merged):
        yield from summarise_merge(exported.made)
        return
    if exported.made is not None:
        yield f"largest difference of a logit from the adapter's: {exported.made.difference:.3g}"
    yield f"{exported.form}  {exported.out}"


def _show(found: Upload, address: str | None, console: Console) -> None:
    visibility = "private" if found.is_private else "public"
    table = Table("file", "bytes", title=f"{found.repository}, {visibility} if it is new", box=SIMPLE_HEAD)
    for name, size in found.files:
        table.add_row(name, f"{size:,}")
    console.print(table)
    if address is None:
        console.print(found.card, highlight=False, soft_wrap=True)
        console.print("nothing was uploaded; without --dry-run, the files above and the card")
    else:
        console.print(f"uploaded  {address}", soft_wrap=True)
