"""What is checked of a request before it gets in line: who asks, how much comes, and what of it can be read."""

import asyncio
import hmac
import re
from collections.abc import Collection
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest

from mixora.endpoint.limits import Limits
from mixora.endpoint.protocol import Request, read_request
from mixora.endpoint.refusals import RefusedError
from mixora.errors import MixoraError
from mixora.files.documents import UnreadableError, decode, parse_json

R = TypeVar("R", bound=Request)
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_sender(request: HttpRequest, api_key: str | None, hosts: Collection[str] | None) -> None:
    """Refuse who has not the key, where one is set, and who was sent by a page of another host, where `hosts` are."""
    host = re.sub(r":\d*$", "", request.headers.get("host", "")).strip("[]")
    if hosts is not None and host not in hosts:
        # a name that a web page made to point here, so that a browser takes the page and the server for one site
        raise RefusedError(400, f"the header Host names no loopback address; valid: {', '.join(hosts)}", code="host")
    if api_key is None:
        return
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not hmac.compare_digest(given.encode("latin-1"), api_key.encode()):
        raise RefusedError(
            401, "the API key is missing or wrong; valid: Authorization: Bearer KEY", code="invalid_api_key"
        )


async def read_body(request: HttpRequest, limits: Limits) -> bytes:
    """The body, if it is declared as JSON, no longer than it may be, and there in time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # what a form of any web page can send is something else
        raise RefusedError(415, "the header Content-Type names no JSON; valid: application/json", code="content_type")
    too_large = RefusedError(
        413, f"the body has more than {limits.body_bytes:,} bytes; valid: at most that", code="too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limits.body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise RefusedError(408, f"the body took more than {limits.body_seconds:g} seconds", code="timeout") from None
    except ClientDisconnect:
        raise RefusedError(400, "the body broke off", code="broken_off") from None
    return bytes(body)


def read_asked(kind: type[R], body: bytes) -> R:
    """The request in a body; a refusal names every mistake."""
    try:
        value: Any = parse_json(decode(body))
        return read_request(kind, value)
    except UnreadableError as error:
        raise RefusedError(400, f"the body {error}", code="invalid_json") from None
    except MixoraError as error:
        raise invalid(error) from None


def invalid(error: MixoraError) -> RefusedError:
    """A mistake in what was asked."""
    named = re.match(r"([a-z_]+)[.:]", str(error))
    return RefusedError(400, str(error), code="invalid_value", param=named[1] if named else None)
