"""The routes: OpenAI's models, chat completions and completions, beside health and metrics."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mixora.answering.answer import Piece
from mixora.answering.names import TokenNames
from mixora.answering.prompts import conversation_ids, text_ids
from mixora.answering.roster import Roster, Voice
from mixora.endpoint import refusals
from mixora.endpoint.engine import Engine, Question
from mixora.endpoint.intake import check_sender, invalid, read_asked, read_body
from mixora.endpoint.limits import Limits
from mixora.endpoint.metrics import CONTENT_TYPE, Metrics
from mixora.endpoint.protocol import ChatRequest, CompletionRequest, Request
from mixora.endpoint.refusals import RefusedError
from mixora.endpoint.replies import Reply
from mixora.errors import DataError

UNCACHED = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
VANISHED = 499
"""The status of a request whose client left, which nobody reads but the metrics."""

Inbox = asyncio.Queue[Piece | RefusedError | None]
"""What comes of a question; None where the client left."""


class Server:
    """What the routes share. `hosts`: names that the header Host may have, any where None."""

    def __init__(
        self, roster: Roster, limits: Limits, api_key: str | None = None, hosts: Collection[str] | None = None
    ) -> None:
        self.roster, self.limits, self.api_key, self.hosts = roster, limits, api_key, hosts
        self.length = min(limits.length or roster.limit, roster.limit)
        self.engine = Engine(roster, limits)
        self.names = TokenNames(roster.tokenizer)
        self.metrics = Metrics(lambda: self.engine.num_running, lambda: self.engine.num_waiting, limits.slots)
        self.created = int(time.time())
        # tokenizers change while they work, and templates are rendered one at a time anyway
        self._encoding, self._num_encoding = anyio.CapacityLimiter(1), 0

    def build(self) -> Starlette:
        """The application; the engine runs as long as it does."""
        routes = [
            self._route("/health", self.tell_health, is_open=True),
            self._route("/metrics", self.tell_metrics),
            self._route("/v1/models", self.list_models),
            self._route("/v1/models/{name:path}", self.describe_model),
            self._route("/v1/chat/completions", self.chat, "POST"),
            self._route("/v1/completions", self.complete, "POST"),
        ]
        handlers: dict[Any, Any] = {HTTPException: _refuse_path, Exception: _refuse_all}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._live)

    @asynccontextmanager
    async def _live(self, application: Starlette) -> AsyncIterator[None]:
        self.engine.start()
        try:
            yield
        finally:
            await run_in_threadpool(self.engine.stop)

    def _route(
        self, path: str, handle: Callable[[HttpRequest], Any], method: str = "GET", is_open: bool = False
    ) -> Route:
        """`handle`, once it is clear who asks; refusals become responses, and all of them are counted."""

        async def respond(request: HttpRequest) -> Response:
            try:
                check_sender(request, None if is_open else self.api_key, self.hosts)
                response = await handle(request)
            except RefusedError as refusal:
                response = _respond(refusal)
            self.metrics.requests.labels(path, str(response.status_code)).inc()
            return response

        return Route(path, respond, methods=[method])

    async def tell_health(self, request: HttpRequest) -> Response:
        """200 while requests are taken on."""
        is_alive = self.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "down"}, 200 if is_alive else 503)

    async def tell_metrics(self, request: HttpRequest) -> Response:
        """For Prometheus."""
        return Response(self.metrics.to_text(), media_type=CONTENT_TYPE)

    async def list_models(self, request: HttpRequest) -> Response:
        """The base and its adapters."""
        return JSONResponse({"object": "list", "data": [self._describe(v) for v in self.roster.voices.values()]})

    async def describe_model(self, request: HttpRequest) -> Response:
        """One of them."""
        return JSONResponse(self._describe(self._find(request.path_params["name"])))

    async def chat(self, request: HttpRequest) -> Response:
        """An answer in a conversation."""
        asked = read_asked(ChatRequest, await read_body(request, self.limits))
        voice = self._find(asked.model)
        messages, deadline = [message.to_dict() for message in asked.messages], self._deadline()
        ids = await self._encode(lambda: conversation_ids(messages, self.roster.tokenizer, voice.chat), deadline)
        return await self._answer(request, asked, voice, ids, deadline)

    async def complete(self, request: HttpRequest) -> Response:
        """A text continued."""
        asked = read_asked(CompletionRequest, await read_body(request, self.limits))
        voice, prompt, deadline = self._find(asked.model), asked.prompt, self._deadline()
        ids: list[Any]
        if isinstance(prompt, str):
            ids = await self._encode(lambda: text_ids(prompt, self.roster.tokenizer), deadline)
        else:
            ids = list(prompt)
        return await self._answer(request, asked, voice, ids, deadline)

    def _deadline(self) -> float:
        """Of a request whose body is there now."""
        return time.monotonic() + self.limits.seconds

    def _find(self, name: str) -> Voice:
        if name not in self.roster.voices:
            known = ", ".join(self.roster.voices)
            raise RefusedError(404, f"model: got {name!r:.200}; valid: {known}", code="model_not_found", param="model")
        return self.roster.voices[name]

    async def _encode(self, encode: Callable[[], list[int]], deadline: float) -> list[int]:
        self.engine.check_room(self._num_encoding)
        self._num_encoding += 1
        try:
            with anyio.fail_after(deadline - time.monotonic()):
                return await anyio.to_thread.run_sync(encode, limiter=self._encoding)
        except DataError as error:
            raise invalid(error) from None
        except TimeoutError:
            raise refusals.late(self.limits.seconds) from None
        finally:
            self._num_encoding -= 1

    def _check_ids(self, asked: Request, ids: list[int]) -> None:
        """A tokenizer may know more tokens than the model does, and whoever is read beside such a one would suffer."""
        most = self.roster.num_tokens
        if not ids or max(ids) >= most:
            name, got = "messages" if isinstance(asked, ChatRequest) else "prompt", max(ids, default="none")
            raise RefusedError(
                400,
                f"{name}: got token {got}; token ids are 0 to {most - 1}, one or more",
                code="invalid_value",
                param=name,
            )

    async def _answer(
        self, request: HttpRequest, asked: Request, voice: Voice, ids: list[int], deadline: float
    ) -> Response:
        self._check_ids(asked, ids)
        inbox: Inbox = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def deliver(found: Piece | RefusedError) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, found)

        sampling = asked.sampling(self._room_for(asked, ids))
        question = Question(voice, ids, sampling, deliver, deadline)
        self.engine.submit(question)
        watch = asyncio.create_task(self._watch(request, question, inbox))
        pieces = self._follow(question, inbox, watch)
        reply = Reply(asked, self.names, len(ids))
        if asked.stream:
            return StreamingResponse(_stream(asked, reply, pieces), media_type="text/event-stream", headers=UNCACHED)
        async for piece in pieces:
            reply.add(piece)
        return JSONResponse(reply.whole()) if reply.finish else Response(status_code=VANISHED)

    def _room_for(self, asked: Request, ids: list[int]) -> int:
        """The longest answer; a refusal where the model cannot take prompt and answer."""
        most = self.length - len(ids)
        wanted = asked.asked_tokens or min(self.limits.answer_tokens, max(most, 1))
        if wanted > most:
            raise RefusedError(
                400,
                f"max_tokens: the prompt has {len(ids)} tokens and the answer may have {wanted}; valid: at most "
                f"{self.length} together",
                code="context_length_exceeded",
                param="max_tokens",
            )
        return wanted

    async def _watch(self, request: HttpRequest, question: Question, inbox: "Inbox") -> None:
        """Free the slot of a client that hangs up, be its answer on the way or not."""
        while (await request.receive())["type"] != "http.disconnect":
            continue
        question.is_abandoned = True
        inbox.put_nowait(None)

    async def _follow(self, question: Question, inbox: "Inbox", watch: "asyncio.Task[None]") -> AsyncGenerator[Piece]:
        """The pieces of an answer, up to where the client left; a refusal is raised."""
        begun, is_first, is_over = time.monotonic(), True, False
        count = self.metrics.tokens.labels
        try:
            while (found := await inbox.get()) is not None:
                if is_over := isinstance(found, RefusedError):
                    raise found
                if is_first:
                    self.metrics.first_token.observe(time.monotonic() - begun)
                    count(question.voice.name, "prompt").inc(len(question.ids))
                is_first = False
                count(question.voice.name, "answer").inc()
                if is_over := found.finish is not None:
                    self.metrics.seconds.observe(time.monotonic() - begun)
                yield found
                if is_over:
                    return
        finally:
            watch.cancel()
            question.is_abandoned = True
            if not is_over:
                self.metrics.vanished.inc()

    def _describe(self, voice: Voice) -> dict[str, Any]:
        parent = None if voice.inner is None else self.roster.base_name
        told = {"id": voice.name, "object": "model", "created": self.created, "owned_by": "mixora"}
        return {**told, "root": self.roster.base_name, "parent": parent, "max_model_len": self.length}


async def _stream(asked: Request, reply: Reply, pieces: AsyncGenerator[Piece]) -> AsyncIterator[str]:
    """Server-sent events: chunks, perhaps the numbers of tokens, then the end."""
    try:
        if (first := reply.first_chunk()) is not None:
            yield _event(first)
        async for piece in pieces:
            if (chunk := reply.add(piece)) is not None:
                yield _event(chunk)
        if asked.wants_usage:
            yield _event(reply.usage_chunk())
    except RefusedError as refusal:
        yield _event(refusal.to_dict())
    finally:
        await pieces.aclose()
    yield "data: [DONE]\n\n"


def _event(told: dict[str, Any]) -> str:
    return f"data: {json.dumps(told, ensure_ascii=False, allow_nan=False)}\n\n"


def _respond(refusal: RefusedError) -> Response:
    return JSONResponse(refusal.to_dict(), refusal.status, headers=refusal.headers)


async def _refuse_path(request: HttpRequest, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _respond(RefusedError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}"))


async def _refuse_all(request: HttpRequest, error: Exception) -> Response:
    return _respond(refusals.failed())
