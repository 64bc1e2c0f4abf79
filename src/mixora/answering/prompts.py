"""What a model reads of a conversation or a text: the ids that it was trained to read."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from mixora.data.prompts import extend_ids, opening_ids
from mixora.data.templates import render
from mixora.errors import DataError


def conversation_ids(
    messages: Sequence[Mapping[str, str]], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> list[int]:
    """Ids of a conversation that waits for an answer: by the chat template, or each message and a line end.

    For one message of a user these are the ids of a training row's prompt. Raises `DataError` for a template that
    refuses the messages, and where nothing is left to read.
    """
    if chat:
        ids = extend_ids([], "", render(messages, tokenizer, asks=True), tokenizer)
    else:
        ids = text_ids("".join(f"{message['content']}\n" for message in messages), tokenizer)
    return _check(ids)


def text_ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of a text that is to be continued; `DataError` where there are none."""
    return _check(extend_ids(opening_ids(tokenizer), "", text, tokenizer))


def _check(ids: list[int]) -> list[int]:
    if not ids:
        raise DataError("the prompt has no tokens; valid: some text")
    return ids
