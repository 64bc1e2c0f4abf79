"""The command `serve`: an OpenAI-compatible HTTP endpoint over adapters."""

import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from mixora.commands.answers import Adapters, Device, Dtype
from mixora.console import Console
from mixora.errors import ConfigError
from mixora.terminal import Debug, Model, reports_errors

GRACE_SECONDS = 10


@reports_errors
def serve(
    adapters: Adapters,
    model: Model = None,
    host: Annotated[str, typer.Option(help="The address to listen at; loopback reaches this machine alone.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="MIXORA_API_KEY", help="Only who sends this key is answered.")
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers that are computed at the same time.", min=1)] = 8,
    queue: Annotated[int, typer.Option(help="Requests that may wait for a slot.", min=0)] = 64,
    max_length: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; what the base takes, if less.", min=2)
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="The longest answer where a request does not say.", min=1)] = 512,
    max_seconds: Annotated[float, typer.Option(help="For one request, waiting included.", min=0.001)] = 300.0,
    max_body: Annotated[int, typer.Option(help="Bytes of a request's body.", min=1)] = 2**20,
    dtype: Dtype = None,
    device: Device = "cpu",
    debug: Debug = False,
) -> None:
    """Serve adapters over HTTP, in OpenAI's manner: models, chat completions, completions; health and metrics.

    The name of an adapter is that of its folder, or NAME in NAME=PATH; the base's own name serves it without one.
    """
    try:
        from mixora.endpoint.application import Server
        from mixora.endpoint.intake import LOOPBACK
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"serve: {error.name} is not installed; install it with: pip install 'mixora[serve]'"
        ) from None
    from mixora.answering.roster import find_source, load_roster
    from mixora.endpoint.limits import Limits
    from mixora.training.progress import Progress

    if api_key == "":
        raise ConfigError("api_key: is empty, which would be no key; valid: some characters, or none at all")
    limits = Limits(
        slots=slots,
        queue=queue,
        length=max_length,
        answer_tokens=max_tokens,
        seconds=max_seconds,
        body_bytes=max_body,
    )
    sources = [find_source(word, model, dtype) for word in adapters]
    is_loopback = host in LOOPBACK
    with _listen(host, port) as listener:
        console = Console(stderr=True)
        roster = load_roster(sources, device, Progress(console).task)
        server = Server(roster, limits, api_key, LOOPBACK if is_loopback else None)
        if not is_loopback:
            guard = (
                "anyone who reaches it can ask, since there is no --api-key" if api_key is None else "others reach it"
            )
            console.print(f"warning: {host} is no loopback address: {guard}; nothing is encrypted", style="yellow")
        shown = f"[{host}]" if ":" in host else host
        console.print(
            f"http://{shown}:{listener.getsockname()[1]}/v1 serves {', '.join(roster.voices)}", soft_wrap=True
        )
        _run(server.build(), listener)
        console.print("stopped")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{host}:{port}: cannot be listened at: {reason}; valid: another --port or --host") from None


def _run(application: Any, listener: socket.socket) -> None:
    """Until SIGINT or SIGTERM; answers on their way have `GRACE_SECONDS` to come to their end."""
    import uvicorn

    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    settings: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
    config = uvicorn.Config(application, timeout_graceful_shutdown=GRACE_SECONDS, ws="none", **settings)
    with _heeding_only_once():
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _heeding_only_once() -> Iterator[None]:
    """Signals end the server, which sends itself those that it has heeded again when it is done."""
    former = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
