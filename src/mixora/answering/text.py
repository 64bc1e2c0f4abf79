"""Token ids as text that can be shown at once: whole characters only, and nothing that a stop text may begin with."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer: what it adds to that of its prompt, a space at its begin included.

    `length`: characters so far, those that are held back too. `is_stopped`: a stop text came; it and what follows are
    left out.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), prompt: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids = list(prompt)
        # decoders look at neighbours, so the next token is read behind those since `_begin`, told up to `_told`
        self._begin, self._told = 0, len(self._ids)
        self._held = ""
        self.length = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What can be shown once `token` is there; may be empty."""
        self._ids.append(token)
        before, whole = self._decode(self._begin, self._told), self._decode(self._begin, len(self._ids))
        is_longer = whole.startswith(before)
        # otherwise the prompt ended within a character, which is whole now
        added = whole[len(before if is_longer else before.rstrip(REPLACEMENT)) :]
        if not added or whole.endswith(REPLACEMENT):
            return ""
        self._begin, self._told = self._told if is_longer else self._begin, len(self._ids)
        self.length += len(added)
        return self._let_out(self._held + added)

    def finish(self) -> str:
        """What was held back, where the answer ends without a stop text."""
        if self.is_stopped:
            return ""
        # bytes that are no character: read behind others, some decoders would take those for none either
        shown = self._let_out(self._held + self._decode(self._told, len(self._ids)))
        shown, self._held = (shown if self.is_stopped else shown + self._held), ""
        return shown

    def _decode(self, begin: int, end: int) -> str:
        ids = self._ids[begin:end]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _let_out(self, text: str) -> str:
        found = [place for place in map(text.find, self._stops) if place >= 0]
        if found:
            self.is_stopped, self._held = True, ""
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` may begin."""
    most = min(len(text), len(stop) - 1)
    return next((n for n in range(most, 0, -1) if text.endswith(stop[:n])), 0)
