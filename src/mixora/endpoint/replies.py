"""What a client gets: OpenAI's objects for whole answers and for chunks of them."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from mixora.answering.answer import Piece
from mixora.answering.names import TokenNames
from mixora.answering.sampling import Choice
from mixora.endpoint.protocol import ChatRequest, Request


class Reply:
    """One answer in the making. `num_tokens`: those of the answer so far, its end's too."""

    def __init__(self, request: Request, names: TokenNames, prompt_tokens: int) -> None:
        self._request, self._names, self._prompt_tokens = request, names, prompt_tokens
        self._is_chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts: list[str] = []
        self._choices: list[Choice] = []
        self.num_tokens = 0
        self.finish: str | None = None

    def add(self, piece: Piece) -> dict[str, Any] | None:
        """The chunk that tells of a piece; None where it has nothing to tell yet."""
        self.num_tokens += 1
        self._texts.append(piece.text)
        self._choices += piece.choices
        self.finish = piece.finish
        if not (piece.text or piece.choices or piece.finish):
            return None
        if self._is_chat:
            told: dict[str, Any] = {"delta": {"content": piece.text} if piece.text else {}}
        else:
            told = {"text": piece.text}
        return self._chunk([{"index": 0, **told, **self._ending(piece.choices)}])

    def first_chunk(self) -> dict[str, Any] | None:
        """The chunk that opens a chat's stream."""
        if not self._is_chat:
            return None
        delta = {"role": "assistant", "content": ""}
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])

    def usage_chunk(self) -> dict[str, Any]:
        """The chunk that closes a stream whose client asked for it."""
        return {**self._chunk([]), "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The whole answer."""
        text = "".join(self._texts)
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._is_chat else {"text": text}
        choice = {"index": 0, **said, **self._ending(self._choices)}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk" if self._is_chat else "text_completion"), "choices": choices}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._request.model}

    def _usage(self) -> dict[str, int]:
        numbers = {"prompt_tokens": self._prompt_tokens, "completion_tokens": self.num_tokens}
        return {**numbers, "total_tokens": sum(numbers.values())}

    def _ending(self, choices: Sequence[Choice]) -> dict[str, Any]:
        return {"logprobs": self._logprobs(choices), "finish_reason": self.finish}

    def _logprobs(self, choices: Sequence[Choice]) -> dict[str, Any] | None:
        if self._request.num_tops is None:
            return None
        if self._is_chat:
            return {"content": [self._describe(choice) for choice in choices], "refusal": None}
        return {
            "tokens": [self._names.name(choice.token) for choice in choices],
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [self._describe_tops(choice) for choice in choices],
            "text_offset": [choice.offset for choice in choices],
        }

    def _describe_tops(self, choice: Choice) -> dict[str, float]:
        tops: dict[str, float] = {}
        for token, value in choice.top:
            # of tokens with the same text, the likeliest has it
            tops.setdefault(self._names.name(token), value)
        return tops

    def _describe(self, choice: Choice) -> dict[str, Any]:
        assert choice.logprob is not None
        tops = [self._name(token, value) for token, value in choice.top]
        return {**self._name(choice.token, choice.logprob), "top_logprobs": tops}

    def _name(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._names.name(token), "logprob": logprob, "bytes": list(self._names.read_bytes(token))}
