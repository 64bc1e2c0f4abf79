"""What a client is told where it gets no answer, in OpenAI's form."""

from typing import Any

RETRY_SECONDS = 1


class RefusedError(Exception):
    """`status`: of HTTP. `kind`, `code` and `param`: as OpenAI's errors have them. `retry`: it may be asked again."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry = status, message, code, param, retry

    @property
    def kind(self) -> str:
        """OpenAI's name for errors of such a status."""
        names = {401: "authentication_error", 429: "rate_limit_error"}
        return names.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """What clients retry by: OpenAI's own would ask again after every error of a server."""
        if self.retry:
            return {"Retry-After": str(RETRY_SECONDS)}
        known = {401: {"WWW-Authenticate": "Bearer"}}
        return {"x-should-retry": "false", **known.get(self.status, {})}


def full(waiting: int) -> RefusedError:
    """The queue holds as many as it may."""
    return RefusedError(
        429, f"{waiting} requests wait already; valid: ask again later", code="queue_full", param=None, retry=True
    )


def late(seconds: float) -> RefusedError:
    """A request took longer than it may."""
    return RefusedError(
        504, f"the answer took more than {seconds:g} seconds; valid: a smaller max_tokens", code="timeout"
    )


def failed() -> RefusedError:
    """A fault of ours; what it was stands in the server's own log."""
    return RefusedError(500, "the server failed to compute the answer", code="internal_error")


def closing() -> RefusedError:
    """The server is being ended."""
    return RefusedError(503, "the server is being ended", code="shutting_down")
