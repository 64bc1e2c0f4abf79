"""What the model reads: rows as prompts and answers, as text segments and as token ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from mixora.config import Strict
from mixora.data.templates import render
from mixora.errors import DataError

ModelKind = Literal["decoder", "encoder", "encoder-decoder"]
Message = Mapping[str, str]


class EncodingConfig(Strict):
    """How rows become token ids.

    `max_length`: most tokens of a row, and of a bin when packing. `packing`: put several rows into one bin (decoders).
    `prompt_format`: the tokenizer's chat template, plain `prompt + newline + completion`, or the first if it exists.
    `train_on`: the answers only, or every token.
    """

    max_length: Annotated[int, Field(ge=2, le=2**31 - 1)] = 512
    packing: bool = False
    prompt_format: Literal["auto", "chat", "plain"] = "auto"
    train_on: Literal["completion", "all"] = "completion"


@dataclass(frozen=True)
class Segment:
    """A stretch of text, and whether it is the model's own answer."""

    text: str
    answer: bool


def uses_chat(tokenizer: PreTrainedTokenizerBase, config: EncodingConfig) -> bool:
    """Whether prompts go through the chat template; `DataError` where it is asked for but absent."""
    has_template = bool(tokenizer.chat_template)
    if config.prompt_format == "chat" and not has_template:
        raise DataError("prompt_format: got 'chat', but the tokenizer has no chat template; valid: auto, plain")
    return has_template and config.prompt_format != "plain"


def conversation_of(row: Mapping[str, Any], form: str, answered: bool) -> list[Message]:
    """The row as messages, with the last answer or without it (the row may then lack it)."""
    if form == "messages":
        messages = list(row["messages"])
        return messages[:-1] if not answered and messages[-1]["role"] == "assistant" else messages
    if form == "completion":
        prompt, answer = row["prompt"], row.get("completion")
    elif form == "choice":
        prompt = " ".join(part for part in (row.get("context"), row["question"]) if part)
        answer = row["choices"][row["answer"]] if answered else None
    else:
        raise DataError(f"form: got {form!r}, which has no prompt; valid: completion, messages, choice")
    user: list[Message] = [{"role": "user", "content": prompt}]
    return [*user, {"role": "assistant", "content": str(answer)}] if answered else user


def segment_conversation(messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[Segment]:
    """Alternating prompt and answer segments whose texts, joined, are the whole rendering.

    Raises:
        DataError: the template refuses the messages; it renders a shorter conversation otherwise than as the start
            of a longer one, so answers cannot be told from prompts; or there are several turns and no template.
    """
    if not chat:
        return _segment_plainly(messages)
    segments: list[Segment] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = render(messages[:place], tokenizer, asks=True)
        whole = render(messages[: place + 1], tokenizer, asks=False)
        _check_prefix(done, prompt, place)
        _check_prefix(prompt, whole, place + 1)
        if whole == prompt:
            raise DataError("the chat template renders nothing for an answer of the assistant")
        segments += [Segment(prompt[len(done) :], False), Segment(whole[len(prompt) :], True)]
        done = whole
    if messages[-1]["role"] != "assistant":
        prompt = render(messages, tokenizer, asks=True)
        _check_prefix(done, prompt, len(messages))
        segments.append(Segment(prompt[len(done) :], False))
    return segments


def _segment_plainly(messages: Sequence[Message]) -> list[Segment]:
    if [m["role"] for m in messages] not in (["user"], ["user", "assistant"]):
        raise DataError("messages of several turns or roles need a chat template, and none is in use")
    prompt, *answers = [m["content"] for m in messages]
    return [Segment(prompt + "\n", False), *(Segment(answer, True) for answer in answers)]


def _check_prefix(start: str, whole: str, count: int) -> None:
    if not whole.startswith(start):
        raise DataError(
            f"the chat template renders {count} messages so that they do not start like fewer of them; valid: a "
            "template that only appends, or prompt_format 'plain' for rows of one turn"
        )


def tokenize_segments(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, chat: bool
) -> tuple[list[int], list[bool]]:
    """Token ids, and for each whether it belongs to an answer.

    The ids of the first n segments are always the start of the ids of all of them, so that a model is prompted with
    exactly what it was trained on.
    """
    opening = [] if chat else opening_ids(tokenizer)
    ids, answers, text = list(opening), [False] * len(opening), ""
    for segment in segments:
        ids = extend_ids(ids, text, segment.text, tokenizer)
        text += segment.text
        answers += [segment.answer] * (len(ids) - len(answers))
    return ids, answers


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token if the tokenizer itself puts one before text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def extend_ids(ids: list[int], before: str, text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids`, which stand for `before`, followed by the ids of `text`.

    Both are tokenized together where that leaves `ids` as they are: some tokenizers mark the start of a text, and
    tokenizing `text` alone would put such a mark in the middle. A BOS written out in the text is not doubled.
    """
    whole = tokenizer(before + text, add_special_tokens=False).input_ids
    bos = [tokenizer.bos_token_id]
    if ids[:1] == bos and whole[:1] != bos:
        whole = bos + whole
    if whole[: len(ids)] == ids:
        return whole
    return ids + tokenizer(text, add_special_tokens=False).input_ids


def cut_left(ids: list[int], limit: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The last `limit` ids; a leading BOS stays."""
    if len(ids) <= limit:
        return ids
    kept = 1 if ids[:1] == [tokenizer.bos_token_id] and limit > 1 else 0
    return ids[:kept] + ids[len(ids) - limit + kept :]


def render_prompt(
    row: Mapping[str, Any],
    form: str,
    tokenizer: PreTrainedTokenizerBase,
    config: EncodingConfig,
    *,
    model_kind: ModelKind = "decoder",
    room: int = 0,
) -> list[int]:
    """Token ids of the prompt that the model sees when it generates, at most `max_length - room`, cut from the left.

    A training row that was not truncated starts with exactly these ids. The row's own answer is not needed.

    Raises:
        DataError: a form without a prompt, a template that refuses the messages, or no room left for the prompt.
    """
    limit = config.max_length - room
    if limit < 1:
        raise DataError(f"room: got {room}; valid: 0 to {config.max_length - 1}, since max_length holds the prompt too")
    messages = conversation_of(row, form, answered=False)
    return cut_left(tokenize_prompt(messages, tokenizer, config, model_kind), limit, tokenizer)


def tokenize_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, config: EncodingConfig, model_kind: ModelKind
) -> list[int]:
    """Ids of a conversation that waits for an answer, of any length; an encoder's end with its own EOS."""
    chat = uses_chat(tokenizer, config)
    segments = segment_conversation(messages, tokenizer, chat)
    if model_kind == "decoder":
        return tokenize_segments(segments, tokenizer, chat)[0]
    text = "".join(segment.text for segment in segments)
    return tokenizer(text if chat else text.removesuffix("\n")).input_ids


def render_choices(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    config: EncodingConfig,
    *,
    model_kind: ModelKind = "decoder",
) -> list[list[int]]:
    """Token ids of each choice of a `choice` row as it follows the prompt, without EOS."""
    if model_kind == "encoder-decoder":
        return [tokenizer(text_target=c, add_special_tokens=False).input_ids for c in row["choices"]]
    messages = conversation_of(row, "choice", answered=False)
    chat = uses_chat(tokenizer, config)
    segments = segment_conversation(messages, tokenizer, chat)
    prompt, _ = tokenize_segments(segments, tokenizer, chat)
    text = "".join(segment.text for segment in segments)
    return [extend_ids(prompt, text, choice, tokenizer)[len(prompt) :] for choice in row["choices"]]
