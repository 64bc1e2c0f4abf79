"""One answer as it comes into being: tokens, text, and why it ended."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mixora.answering.sampling import Choice, Sampler, Sampling
from mixora.answering.text import TextStream

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Piece:
    """What one step added. `choices`: the tokens that it told of; `finish`: why the answer ended, where it did."""

    text: str
    choices: tuple[Choice, ...] = ()
    finish: Finish | None = None


class Answer:
    """The state of one answer. `last`: the token that the model reads next; `length`: tokens so far, an end's too."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int], sampling: Sampling, prompt: Sequence[int]
    ) -> None:
        self.sampling = sampling
        self.length = 0
        self.last = -1
        self._ends = ends
        self._sampler = Sampler(sampling)
        self._text = TextStream(tokenizer, sampling.stop, prompt)
        self._waiting: list[Choice] = []

    def add(self, logits_V: Tensor) -> Piece:
        """Take the next token. Tokens whose text is held back are told with the piece that shows it."""
        choice = self._sampler.choose(logits_V)
        self.last, self.length = choice.token, self.length + 1
        if choice.token in self._ends:
            return self._end(self._text.finish(), "stop")
        self._waiting.append(choice._replace(offset=self._text.length))
        text = self._text.add(choice.token)
        if self._text.is_stopped:
            return self._end(text, "stop")
        if self.length >= self.sampling.max_tokens:
            text += self._text.finish()
            return self._end(text, "stop" if self._text.is_stopped else "length")
        return Piece(text, self._tell()) if text else Piece("")

    def _end(self, text: str, finish: Finish) -> Piece:
        return Piece(text, self._tell(), finish)

    def _tell(self) -> tuple[Choice, ...]:
        told, self._waiting = tuple(self._waiting), []
        return told
