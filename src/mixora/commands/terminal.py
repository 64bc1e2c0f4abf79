"""What all commands share: options, settings as key=value words, errors with their exit codes, JSON."""

import errno
import io
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixora.commands.completion import complete_model, complete_recipe, complete_run, complete_setting
from mixora.display.console import Console
from mixora.errors import MixoraError, StoppedError
from mixora.files.asides import number_of

REFUSALS = {
    errno.ENOENT: "a path that exists",
    errno.ENOTDIR: "a path through folders",
    errno.EISDIR: "a file",
    errno.EACCES: "one that you may read and write",
    errno.EPERM: "one that you may read and write",
    errno.EROFS: "a place that can be written",
    errno.EFBIG: "a file system that takes larger files",
    errno.ENOSPC: "a disk with more room, or less to write",
    errno.EDQUOT: "a disk with more room, or less to write",
    errno.ENAMETOOLONG: "a shorter name",
}

SECONDS_TO_BE_ENDED = 5.0
INTERRUPTED = 130

if TYPE_CHECKING:
    from mixora.planning.plan import Plan

Settings = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN.YAML] [KEY=VALUE]...", help="A run file, then changes to it.", autocompletion=complete_setting
    ),
]
Changes = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the run.", autocompletion=complete_setting),
]
Recipe = Annotated[
    str | None,
    typer.Option(help="A method; see `mixora recipes`. Short for adapter.recipe=…", autocompletion=complete_recipe),
]
Model = Annotated[
    str | None, typer.Option(help="The base model. Short for model.base=…", autocompletion=complete_model)
]
Data = Annotated[str | None, typer.Option(help="A file, a folder or a hub id. Short for data.source=…")]
Out = Annotated[str | None, typer.Option(help="Where to write. Short for out=…")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output, for machines.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what mixora wrote there before.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check what can be checked, say what would be written; write nothing.")
]
_NEW_FOLDER = typer.Option(help="The folder of the result; new or empty, or with --overwrite one that mixora wrote.")
NewFolder = Annotated[Path, _NEW_FOLDER]
OptionalNewFolder = Annotated[Path | None, _NEW_FOLDER]
Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="The folder that `mixora train` wrote.", autocompletion=complete_run)
]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """A user's mistake ends with one message and exit code 2, a fault of ours with exit code 1.

    Paths among the options may begin with ~, also where no shell reads it (--out=~/runs).
    """

    @wraps(command)
    def run(**options: Any) -> None:
        _quieten_libraries()
        options |= {k: Path(os.path.expanduser(v)) for k, v in options.items() if isinstance(v, Path)}
        try:
            command(**options)
        except StoppedError as stop:
            _end("stopped", str(stop), INTERRUPTED, {})
        except MixoraError as error:
            _end("error", str(error), 2, options)
        except KeyboardInterrupt:
            _end("stopped", "interrupted; nothing more was written", INTERRUPTED, options)
        except Exception as error:
            refusal = find_refusal(error)
            if refusal is not None:
                _end("error", refusal, 2, options)
            report = f"{type(error).__name__}: {error}\n(--debug shows where; please report it)"
            _end("fault", report, 1, options)

    return run


def find_refusal(error: Exception) -> str | None:
    """What to tell where the file system refused, which is for the user to settle; None for other errors."""
    number = number_of(error)
    if number not in REFUSALS:
        return None
    where = getattr(error, "filename", None) or "writing or reading a file"
    return f"{where}: {os.strerror(number)}; valid: {REFUSALS[number]}"


def _end(kind: str, text: str, code: int, options: dict[str, Any]) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0" or _is_echo(text):
        # the first process, or the one that failed first, says what there is to say, and a launcher ends the others
        time.sleep(SECONDS_TO_BE_ENDED)
        kind = f"{kind} in process {rank}"
        if code == INTERRUPTED:
            raise typer.Exit(code)
    if options.get("debug"):
        raise
    Console(stderr=True).print(f"{kind}: ", end="", style="bold red")
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


def _is_echo(text: str) -> bool:
    """Whether this process most likely fails since another one did."""
    return "WORLD_SIZE" in os.environ and re.search(r"gloo|NCCL|[Cc]onnection (closed|reset)|^Dist", text) is not None


def _quieten_libraries() -> None:
    """Our own progress and errors say what matters. Imports none of them, so that mistakes are told at once."""
    # names of files may hold what no encoding has
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for module in ("peft", "transformers"):
        warnings.filterwarnings("ignore", module=module)


def make_console(as_json: bool) -> Console:
    """Where people's output goes: nowhere if machines read."""
    return Console(quiet=True) if as_json else Console()


def read_tree(settings: list[str] | None, **short: str | int | None) -> dict[str, Any]:
    """The settings of a file, then of key=value words, then of short options; later ones win."""
    from mixora.config import put, read_assignment, read_yaml

    words = list(settings or ())
    tree = read_yaml(words.pop(0)) if words and "=" not in words[0] else {}
    for word in words:
        put(tree, *read_assignment(word))
    for path, value in short.items():
        if value is not None:
            put(tree, path.replace("__", "."), value)
    return tree


def print_json(value: Any) -> None:
    """One JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


def print_plan(plan: "Plan", full: bool = False) -> None:
    """The table of sites and the remarks below it."""
    Console().print(plan.table(full))
    for note in plan.notes:
        Console().print(f"note: {note}")


def tell_written(paths: Mapping[str, object], dry_run: bool) -> None:
    """What was written where, or would have been."""
    console = Console()
    if dry_run:
        console.print("nothing was written; without --dry-run:")
    for name, path in paths.items():
        console.print(f"{name:<8} {path}", highlight=False, soft_wrap=True)
