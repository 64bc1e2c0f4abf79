"""How much one server takes on."""

from typing import Annotated

from pydantic import Field

from mixora.config import Strict, Whole


class Limits(Strict):
    """What is beyond these is refused before the model sees it.

    slots: answers that are computed at the same time. queue: requests that wait for a slot, or to be read by the
    tokenizer. length: tokens of prompt
    and answer together; the base's own limit unless given. answer_tokens: the longest answer where a request does not
    say. seconds: for one request, waiting included. body_bytes: of a request's body; body_seconds: for it to arrive.
    """

    slots: Whole = 8
    queue: Annotated[int, Field(ge=0, le=2**31 - 1)] = 64
    length: Whole | None = None
    answer_tokens: Whole = 512
    seconds: Annotated[float, Field(gt=0, le=1e6)] = 300.0
    body_bytes: Whole = 2**20
    body_seconds: Annotated[float, Field(gt=0, le=1e6)] = 30.0
