"""A conversation with one voice of a roster at a time, answered piece by piece."""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from mixora.answering.answer import Answer
from mixora.answering.prompts import conversation_ids
from mixora.answering.roster import Roster, Voice
from mixora.answering.sampling import Sampling
from mixora.errors import DataError


@dataclass
class Conversation:
    """What was said so far, and who answers next."""

    roster: Roster
    voice: Voice
    sampling: Sampling
    messages: list[dict[str, str]] = field(default_factory=list)

    def ask(self, text: str) -> Generator[str]:
        """The answer as it comes. What was given of it is remembered, also where the caller stops early.

        Raises `DataError` where the conversation is too long, cannot be rendered, or holds a token that only the
        tokenizer knows; it is then as it was.
        """
        asked = [*self.messages, {"role": "user", "content": text}]
        ids = conversation_ids(asked, self.roster.tokenizer, self.voice.chat)
        if max(ids) >= self.roster.num_tokens:
            raise DataError(
                f"the model knows no token {max(ids)}; valid: text of tokens up to {self.roster.num_tokens - 1}"
            )
        if len(ids) + self.sampling.max_tokens > self.roster.limit:
            raise DataError(
                f"the conversation has {len(ids)} tokens, and the model takes {self.roster.limit} with the "
                f"{self.sampling.max_tokens} of an answer; valid: /reset, or a smaller --max-new-tokens"
            )
        said: list[str] = []
        try:
            for piece in self._answer(ids):
                said.append(piece)
                yield piece
        finally:
            self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    def _answer(self, ids: list[int]) -> Iterator[str]:
        decoder = self.roster.decoder
        answer = Answer(self.roster.tokenizer, self.roster.ends, self.sampling, ids)
        self.roster.activate(self.voice)
        rows, logits_BV = decoder.begin([ids])
        while True:
            piece = answer.add(logits_BV[0])
            yield piece.text
            if piece.finish:
                return
            logits_BV = decoder.advance(rows, [answer.last])
