"""Token ids as text that can be shown at once: whole characters only, and nothing that a stop text may begin with."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of one answer. `is_stopped`: a stop text came; it and what follows are left out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._ids: list[int] = []
        # decoders look at neighbours, so the next token is read behind those since `_begin`, told up to `_told`
        self._begin = self._told = 0
        self._held = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """What can be shown once `token` is there; may be empty."""
        self._ids.append(token)
        before, whole = self._decode(self._begin, self._told), self._decode(self._begin, len(self._ids))
        if len(whole) <= len(before) or whole.endswith(REPLACEMENT):
            return ""
        self._begin, self._told = self._told, len(self._ids)
        return self._let_out(self._held + whole[len(before) :])

    def finish(self) -> str:
        """What was held back, where the answer ends without a stop text."""
        if self.is_stopped:
            return ""
        before, whole = self._decode(self._begin, self._told), self._decode(self._begin, len(self._ids))
        shown = self._let_out(self._held + whole[len(before) :])
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
