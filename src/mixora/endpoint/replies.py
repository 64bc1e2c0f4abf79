"""What a client gets: OpenAI's objects for whole answers and for chunks of them."""

import time
import uuid
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixora.answering.answer import Piece
from mixora.answering.sampling import Choice
from mixora.endpoint.protocol import ChatRequest, Request


class Reply:
    """One answer in the making. `num_tokens`: those of the answer so far, its end's too."""

    def __init__(self, request: Request, tokenizer: PreTrainedTokenizerBase, prompt_tokens: int) -> None:
        self._request, self._tokenizer, self._prompt_tokens = request, tokenizer, prompt_tokens
        self._is_chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._texts: list[str] = []
        self._choices: list[Choice] = []
        self._length = 0
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
        self._length = 0
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
        tokens = [self._text_of(choice.token) for choice in choices]
        offsets = []
        for token in tokens:
            offsets.append(self._length)
            self._length += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [{self._text_of(token): value for token, value in choice.top} for choice in choices],
            "text_offset": offsets,
        }

    def _describe(self, choice: Choice) -> dict[str, Any]:
        assert choice.logprob is not None
        tops = [self._name(token, value) for token, value in choice.top]
        return {**self._name(choice.token, choice.logprob), "top_logprobs": tops}

    def _name(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text_of(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text_of(self, token: int) -> str:
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
