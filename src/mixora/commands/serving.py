"""The command `serve`: an OpenAI-compatible HTTP endpoint over adapters."""

import asyncio
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mixora.commands.answers import Adapters, Device, Dtype
from mixora.commands.terminal import Debug, Model, reports_errors
from mixora.display.console import Console
from mixora.errors import ConfigError

if TYPE_CHECKING:
    from mixora.answering.roster import Roster
    from mixora.endpoint.application import Server
    from mixora.endpoint.limits import Limits

GRACE_SECONDS = 10
"""How long answers on their way have to come to their end when the server is ended."""
LAST_SECONDS = 5
"""How long those that did not have to be told so."""

Host = Annotated[str, typer.Option(help="The address to listen at; loopback reaches this machine alone.")]
Port = Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)]
Key = Annotated[str | None, typer.Option(envvar="MIXORA_API_KEY", help="Only who sends this key is answered.")]
Slots = Annotated[int, typer.Option(help="Answers that are computed at the same time.", min=1)]
Queue = Annotated[int, typer.Option(help="Requests that may wait for a slot.", min=0)]
MaxLength = Annotated[
    int | None, typer.Option(help="Most tokens of prompt and answer; what the base takes, if less.", min=2)
]
MaxTokens = Annotated[int, typer.Option(help="The longest answer where a request does not say.", min=1)]
MaxSeconds = Annotated[float, typer.Option(help="For one request, waiting included.", min=0.001)]
MaxBody = Annotated[int, typer.Option(help="Bytes of a request's body.", min=1)]


@reports_errors
def serve(
    adapters: Adapters,
    model: Model = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_key: Key = None,
    slots: Slots = 8,
    queue: Queue = 64,
    max_length: MaxLength = None,
    max_tokens: MaxTokens = 512,
    max_seconds: MaxSeconds = 300.0,
    max_body: MaxBody = 2**20,
    dtype: Dtype = None,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Serve adapters over HTTP, in OpenAI's manner: models, chat completions, completions; health and metrics.

    The name of an adapter is that of its folder, or NAME in NAME=PATH; the base's own name serves it without one.
    """
    if api_key == "":
        raise ConfigError("api_key: is empty, which would be no key; valid: some characters, or none at all")
    _check_libraries()
    from mixora.answering.roster import find_source, load_roster
    from mixora.config import parse
    from mixora.endpoint.limits import Limits
    from mixora.training.progress import Progress

    of_request = {"length": max_length, "answer_tokens": max_tokens, "seconds": max_seconds, "body_bytes": max_body}
    limits = parse(Limits, {"slots": slots, "queue": queue, **of_request})
    sources = [find_source(word, model, dtype) for word in adapters]
    with _listen(host, port) as listener:
        console = Console(stderr=True)
        _serve(load_roster(sources, device, Progress(console).task), limits, api_key, host, listener, console)


def _check_libraries() -> None:
    try:
        import mixora.endpoint.application  # noqa: F401 - the one that needs all of them
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve: {error.name} is not installed; install it with: pip install 'mixora[serve]'"
        ) from None


def _serve(
    roster: "Roster", limits: "Limits", api_key: str | None, host: str, listener: socket.socket, console: Console
) -> None:
    from mixora.endpoint.application import Server
    from mixora.endpoint.intake import LOOPBACK

    is_loopback = host in LOOPBACK
    server = Server(roster, limits, api_key, LOOPBACK if is_loopback else None)
    if not is_loopback:
        guard = "anyone who reaches it can ask, since there is no --api-key" if api_key is None else "others reach it"
        console.print(f"warning: {host} is no loopback address: {guard}; nothing is encrypted", style="yellow")
    shown = f"[{host}]" if ":" in host else host
    console.print(f"http://{shown}:{listener.getsockname()[1]}/v1 serves {', '.join(roster.voices)}", soft_wrap=True)
    _run(server, listener)
    console.print("stopped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port}: cannot be listened at: {reason}; valid: another --port or --host") from None


def _run(server: "Server", listener: socket.socket) -> None:
    """Until SIGINT or SIGTERM; answers on their way have `GRACE_SECONDS` to come to their end."""
    import uvicorn

    class Web(uvicorn.Server):
        """Has the engine end answers before they would be cut off without a word."""

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(GRACE_SECONDS, server.engine.close)
            await super().shutdown(sockets)

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    cut_off = GRACE_SECONDS + LAST_SECONDS
    config = uvicorn.Config(server.build(), timeout_graceful_shutdown=cut_off, ws="none", **settings)
    with _heeding_only_once():
        Web(config).run(sockets=[listener])


@contextmanager
def _heeding_only_once() -> Iterator[None]:
    """Signals end the server, which sends itself those that it has heeded again when it is done."""
    former = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
