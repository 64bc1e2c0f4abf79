"""Names and bytes of single tokens, joined, are the text that they were cut from."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixora.answering.names import TokenNames
from tests.characters import build_tokenizer
from tests.pieces import byte_tokenizer, word_tokenizer

TOKENIZERS = {"bytes": byte_tokenizer(), "words": word_tokenizer(), "letters": build_tokenizer()}


@pytest.mark.parametrize("kind", ["bytes", "words"])
@given(st.text("am n\u00e9\u20ac\U0001f600\ufffd", max_size=12) | st.text(max_size=6))
def test_bytes_of_tokens_are_those_of_their_text(kind, said):
    tokenizer = TOKENIZERS[kind]
    names = TokenNames(tokenizer)
    ids = tokenizer(f"a{said}", add_special_tokens=False).input_ids
    assert b"".join(map(names.read_bytes, ids)).decode().removeprefix(" ") == f"a{said}"


def test_a_token_behind_a_space_has_its_space():
    tokenizer = TOKENIZERS["words"]
    names = TokenNames(tokenizer)
    assert list(map(names.name, tokenizer("my name is", add_special_tokens=False).input_ids)) == [" my", " name", " is"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_two_tokens_share_a_name_but_those_of_the_same_bytes(kind):
    tokenizer = TOKENIZERS[kind]
    names = TokenNames(tokenizer)
    found = [(names.name(token), names.read_bytes(token)) for token in range(len(tokenizer))]
    assert len({name for name, _ in found}) == len({read for _, read in found})
    twice = len(found) - len({name for name, _ in found})
    # the letters and the space, which are bytes too
    assert twice == {"bytes": 0, "words": 95, "letters": 0}[kind]


def test_parts_of_a_character_are_told_as_bytes():
    for tokenizer in (TOKENIZERS["bytes"], TOKENIZERS["words"]):
        names = TokenNames(tokenizer)
        ids = tokenizer("a€", add_special_tokens=False).input_ids[-3:]
        assert list(map(names.name, ids)) == [r"bytes:\xe2", r"bytes:\x82", r"bytes:\xac"]
        assert list(map(names.read_bytes, ids)) == [b"\xe2", b"\x82", b"\xac"]


def test_special_tokens_and_those_that_do_not_exist():
    names = TokenNames(TOKENIZERS["letters"])
    assert (names.name(1), names.read_bytes(1)) == ("<s>", b"<s>")
    assert names.read_bytes(5000) == b""
