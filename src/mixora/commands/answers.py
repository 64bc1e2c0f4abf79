"""The command `chat`: talk to adapters in a terminal, or line by line from standard input."""

import io
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixora.commands.completion import complete_run
from mixora.commands.terminal import Debug, Model, reports_errors
from mixora.display.console import Console, show_controls
from mixora.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mixora.answering.conversation import Conversation

Adapters = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN_OR_ADAPTER...",
        help="Folders of runs or saved adapters, or hub ids; NAME=PATH gives one another name.",
        autocompletion=complete_run,
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; what the run says, else float32.")]
Device = Annotated[str, typer.Option(help="Where the model stands: cpu, cuda, …")]
HELP = """/adapter         who can answer; the star is who does
/adapter NAME    let this one answer
/base            let the base answer, without an adapter
/reset           forget what was said
/help            this
/quit            leave; so does ctrl-D. Ctrl-C stops an answer
//text           say something that begins with /"""


@reports_errors
def chat(
    adapters: Adapters,
    model: Model = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.", min=1)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest tokens.", min=0.0, max=2.0)] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw among the likeliest tokens with this probability together.", min=0.0, max=1.0)
    ] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Of the draws of each answer.", min=0, max=2**63 - 1)] = None,
    dtype: Dtype = None,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Talk to trained adapters: in a terminal, or a line at a time from standard input.

    The first one answers until /adapter NAME or /base says otherwise; /help lists what can be typed.
    """
    from mixora.answering.conversation import Conversation
    from mixora.answering.roster import find_source, load_roster
    from mixora.answering.sampling import Sampling
    from mixora.training.progress import Progress

    if (seed is not None or top_p < 1) and temperature == 0:
        idle = "top_p" if top_p < 1 else "seed"
        raise ConfigError(
            f"{idle}: has no effect where the likeliest token is taken; valid: with --temperature above 0"
        )
    # what is said about loading is no part of an answer
    progress = Progress(Console(stderr=True))
    roster = load_roster([find_source(word, model, dtype) for word in adapters], device, progress.task)
    first = list(roster.voices.values())[1]
    talk = Conversation(roster, first, Sampling(max_new_tokens, temperature, top_p, seed))
    if sys.stdin.isatty():
        Console().print(f"{first.name} on {roster.base_name}; /help lists the commands", style="dim", highlight=False)
    _converse(talk)


def _converse(talk: "Conversation") -> None:
    """Take lines until one says that it is over."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    for line in _read_lines(talk):
        if line == "/quit":
            return
        if not _is_text(line):
            _complain(f"the line is no text in {sys.stdin.encoding}, so nobody was asked")
        elif line.startswith("/") and not line.startswith("//"):
            _obey(line, talk)
        elif line.strip():
            _say(line.removeprefix("/") if line.startswith("//") else line, talk)


def _is_text(line: str) -> bool:
    """Whether all bytes of a line were characters."""
    try:
        line.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_lines(talk: "Conversation") -> Iterator[str]:
    """What is typed, until the end of input; without a terminal, lines without a prompt."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    import readline  # noqa: F401 - lines can be edited, and earlier ones found

    while True:
        try:
            yield input(f"to {show_controls(talk.voice.name)}> ")
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            # at the prompt, it empties the line
            typer.echo()


def _obey(line: str, talk: "Conversation") -> None:
    words = line.split(maxsplit=1)
    if words[0] == "/help":
        typer.echo(HELP)
    elif words[0] == "/reset":
        talk.messages = []
        typer.echo("forgotten")
    elif words[0] == "/base":
        _switch(talk, talk.roster.base_name)
    elif words[0] == "/adapter" and len(words) == 2:
        _switch(talk, words[1].strip())
    elif words[0] == "/adapter":
        for voice in talk.roster.voices.values():
            kind = "the base" if voice.inner is None else "adapter"
            typer.echo(show_controls(f"{'*' if voice == talk.voice else ' '} {voice.name} ({kind})"))
    else:
        _complain(f"{words[0]}: no such command; valid: /adapter, /base, /reset, /help, /quit")


def _switch(talk: "Conversation", name: str) -> None:
    try:
        talk.voice = talk.roster.find(name)
    except ConfigError as error:
        _complain(str(error).removeprefix("model: "))
        return
    typer.echo(show_controls(f"{name} answers"))


def _say(text: str, talk: "Conversation") -> None:
    """Print the answer as it comes; ctrl-C ends it after the token at hand."""
    stopped = threading.Event()
    Console().print(f"{talk.voice.name}:", style="bold", end=" ", highlight=False, soft_wrap=True)
    try:
        with _on_interrupt(stopped.set), closing(talk.ask(text)) as pieces:
            for piece in pieces:
                typer.echo(show_controls(piece), nl=False)
                sys.stdout.flush()
                if stopped.is_set():
                    break
    except DataError as error:
        typer.echo()
        _complain(str(error))
        return
    typer.echo(" (stopped)" if stopped.is_set() else "")


def _complain(text: str) -> None:
    Console(stderr=True).print(text, style="red", highlight=False, soft_wrap=True)


@contextmanager
def _on_interrupt(then: Callable[[], None]) -> Iterator[None]:
    """Have ctrl-C do this: an exception in the middle of a model would leave its pass open."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        then()

    former = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
