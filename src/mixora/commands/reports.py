"""The command `report`: the page of a run."""

from pathlib import Path
from typing import Annotated

import typer

from mixora.commands.terminal import AsJson, Debug, print_json, reports_errors
from mixora.display.console import Console


@reports_errors
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `mixora train` wrote, or a folder with a trainer's checkpoints.")
    ],
    out: Annotated[Path | None, typer.Option(help="The page; report.html in DIR, which is replaced.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that --out names.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write the page of a run anew from its record: curves, routers, tokens, verdicts. Loads no model."""
    from mixora.diagnostics.checkpoint import find_record
    from mixora.diagnostics.report import PAGE, render, summarise
    from mixora.diagnostics.verdict import judge_routers
    from mixora.files.folders import write_text

    record = find_record(folder)
    page = write_text(out or folder / PAGE, render(record), overwrite or out is None)
    findings = judge_routers(record)
    if as_json:
        print_json({"report": page, "summary": summarise(record), "routers": [vars(finding) for finding in findings]})
        return
    console = Console()
    for text in (summarise(record), *(f"{finding.kind}: {finding.text}" for finding in findings), f"report   {page}"):
        console.print(text, highlight=False, soft_wrap=True)
