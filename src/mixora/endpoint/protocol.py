"""What clients may ask: OpenAI's requests for chat completions and completions, as far as they are served.

A parameter that would have no effect here is refused unless its value asks for nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from mixora.answering.sampling import Sampling
from mixora.config import Strict, Whole, parse
from mixora.errors import ConfigError

MOST_STOPS, MOST_STOP = 8, 200

Stop = Annotated[str, Field(min_length=1, max_length=MOST_STOP)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
R = TypeVar("R", bound="Request")


def _nothing(value: Any) -> Any:
    if value not in (None, 0, {}, [], ""):
        raise ValueError("is not served; valid: left out")
    return value


NotServed = Annotated[Any, AfterValidator(_nothing)]


class StreamOptions(Strict):
    """`include_usage`: a last chunk tells the numbers of tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Request(Strict):
    """What both kinds of requests have. Nulls count as left out."""

    model: Annotated[str, Field(min_length=1, max_length=1000)]
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[tuple[Stop, ...], Field(max_length=MOST_STOPS)] = ()
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    # say who asks and what for, and change no answer
    user: str | None = None
    metadata: dict[str, str] | None = None
    frequency_penalty: NotServed = None
    presence_penalty: NotServed = None
    logit_bias: NotServed = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: has no effect without stream; valid: with stream: true")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def num_tops(self) -> int | None:
        """How many likeliest tokens are told beside each; None for no log probabilities."""
        raise NotImplementedError

    @property
    def asked_tokens(self) -> int | None:
        """The longest answer, where the request says one."""
        return self.max_tokens

    def sampling(self, max_tokens: int) -> Sampling:
        """How to make an answer of at most `max_tokens`."""
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        return Sampling(max_tokens, self.temperature, self.top_p, self.seed, stops, self.num_tops)


class TextPart(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[tuple[TextPart, ...], Field(min_length=1)]
    name: str | None = None
    # what an answer of this server holds beside its text, handed back
    refusal: None = None

    def to_dict(self) -> dict[str, str]:
        """As chat templates know it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        # templates of open models do not know the newer name
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class ResponseFormat(Strict):
    """Text is the only form."""

    type: Literal["text"]


class ChatRequest(Request):
    """A conversation that waits for an answer."""

    messages: Annotated[tuple[Message, ...], Field(min_length=1)]
    max_completion_tokens: Whole | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: NotServed = None
    # without tools there is none to choose
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] = False

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: has no effect without logprobs; valid: with logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_completion_tokens: stands beside max_tokens; valid: one of them")
        return self

    @property
    def num_tops(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def asked_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Request):
    """A text, or its token ids, that is to be continued; several prompts are several requests."""

    prompt: str | tuple[TokenId, ...] | tuple[str, ...] | tuple[tuple[TokenId, ...], ...]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: NotServed = None

    @field_validator("prompt")
    @classmethod
    def _take_the_only_one(cls, prompt: Any) -> Any:
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return prompt
        if len(prompt) > 1:
            raise ValueError(f"got {len(prompt)} prompts; valid: one, and a request for each other")
        return prompt[0]

    @property
    def num_tops(self) -> int | None:
        return self.logprobs


def read_request(kind: type[R], body: Any) -> R:
    """Read a body as JSON gave it; `ConfigError` with every mistake."""
    if not isinstance(body, Mapping):
        raise ConfigError(f"the body: got {type(body).__name__}; valid: an object")
    return parse(kind, {name: value for name, value in body.items() if value is not None})
