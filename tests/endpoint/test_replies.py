"""What a client gets of answers whose tokens are words behind a space, or parts of a character."""

import pytest
import torch

from mixora.answering.answer import Answer
from mixora.answering.names import TokenNames
from mixora.endpoint.protocol import ChatRequest, CompletionRequest, read_request
from mixora.endpoint.replies import Reply
from tests.pieces import byte_tokenizer, word_tokenizer

BYTES, WORDS = byte_tokenizer(), word_tokenizer()


def answer(request, tokenizer, prompt, ids):
    """The chunks of an answer of these `ids`, of which each is likelier than all others, and the whole."""
    answer = Answer(tokenizer, frozenset(), request.sampling(len(ids)), prompt)
    reply, chunks = Reply(request, TokenNames(tokenizer), len(prompt)), []
    for token in ids:
        logits_V = torch.arange(len(tokenizer)) / len(tokenizer)
        logits_V[token] = 9.0
        chunks.append(reply.add(answer.add(logits_V)))
        if reply.finish:
            break
    return [chunk["choices"][0] for chunk in chunks if chunk], reply.whole()["choices"][0]


def complete(tokenizer, prompt, said, stop=(), **settings):
    """Its text goes on behind the prompt's."""
    known, ids = tokenizer(prompt).input_ids, tokenizer(prompt + said).input_ids
    request = CompletionRequest(model="red", prompt=prompt, temperature=0, stop=stop, **settings)
    return answer(request, tokenizer, known, ids[len(known) :])


def test_a_continuation_keeps_its_spaces():
    chunks, found = complete(WORDS, "my", " name is", logprobs=0)
    assert found["text"] == " name is"
    assert found["logprobs"]["tokens"] == [" name", " is"] and found["logprobs"]["text_offset"] == [0, 5]
    assert [chunk["text"] for chunk in chunks] == [" name", " is"]
    assert [chunk["logprobs"]["text_offset"] for chunk in chunks] == [[0], [5]]


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
def test_parts_of_a_character_are_apart(tokenizer):
    _, found = complete(tokenizer, "a", "ab\u20accd", logprobs=5)
    told = found["logprobs"]
    assert found["text"] == "ab\u20accd"
    assert told["tokens"] == ["a", "b", r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac", "c", "d"]
    assert told["text_offset"] == [0, 1, 2, 2, 2, 3, 4]
    assert [len(tops) for tops in told["top_logprobs"]] == [5] * 7
    pairs = zip(told["top_logprobs"], told["tokens"], strict=True)
    assert [tops[name] for tops, name in pairs] == told["token_logprobs"]


def test_of_tokens_with_one_text_the_likeliest_is_told():
    byte, letter = WORDS.convert_tokens_to_ids(["<0x61>", "a"])
    request = CompletionRequest(model="red", prompt="a", temperature=0, logprobs=2)
    talk, logits_V = Answer(WORDS, frozenset(), request.sampling(2), [letter]), torch.zeros(len(WORDS))
    logits_V[byte], logits_V[letter] = 8.0, 9.0
    piece = talk.add(logits_V)
    (tops,) = Reply(request, TokenNames(WORDS), 1).add(piece)["choices"][0]["logprobs"]["top_logprobs"]
    assert tops == {"a": piece.choices[0].logprob}


@pytest.mark.parametrize("tokenizer", [BYTES, WORDS], ids=["bytes", "words"])
def test_bytes_of_a_chat_are_those_of_its_text(tokenizer):
    messages = [{"role": "user", "content": "my"}]
    asked = {"model": "red", "messages": messages, "temperature": 0, "logprobs": True, "top_logprobs": 2}
    request = read_request(ChatRequest, asked)
    known, ids = tokenizer("my").input_ids, tokenizer("my n\u20ac").input_ids
    chunks, found = answer(request, tokenizer, known, ids[len(known) :])
    told = found["logprobs"]["content"]
    assert found["message"]["content"] == " n\u20ac" == "".join(c["delta"].get("content", "") for c in chunks)
    assert bytes(byte for entry in told for byte in entry["bytes"]).decode() == " n\u20ac"
    assert [entry for chunk in chunks for entry in chunk["logprobs"]["content"]] == told
    assert all(entry["top_logprobs"][0]["bytes"] == entry["bytes"] for entry in told)


def test_a_stop_text_may_lie_over_words():
    chunks, found = complete(WORDS, "my", " name is my", stop=("e i",))
    assert (found["text"], found["finish_reason"]) == (" nam", "stop")
    assert "".join(chunk["text"] for chunk in chunks) == " nam"
