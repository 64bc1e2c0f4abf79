"""What is shown while an answer comes, joined, is what the tokenizer gives for the whole."""

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mixora.answering.text import TextStream
from tests.characters import build_tokenizer

LETTERS = build_tokenizer()


def byte_tokenizer():
    """One token per byte, so that a character may have four."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


BYTES = byte_tokenizer()


def stream(tokenizer, ids, stops=()):
    text = TextStream(tokenizer, stops)
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            return pieces
    return [*pieces, text.finish()]


@given(st.text(max_size=12))
def test_characters_are_shown_whole(said):
    ids = BYTES(said).input_ids
    pieces = stream(BYTES, ids)
    assert "".join(pieces) == said
    assert all(piece in said for piece in pieces)


def test_bytes_that_are_no_character_come_at_the_end():
    ids = BYTES("aé").input_ids
    assert stream(BYTES, ids[:-1]) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def first_stop(said, stops):
    """What stands before the stop text that is complete first, letter by letter."""
    for end in range(1, len(said) + 1):
        places = [said[:end].find(stop) for stop in stops if stop in said[:end]]
        if places:
            return said[: min(places)]
    return said


@given(st.text("abc", max_size=12), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_text_is_shown(said, stops):
    ids = LETTERS(said, add_special_tokens=False).input_ids
    assert "".join(stream(LETTERS, ids, stops)) == first_stop(said, stops)


def test_what_cannot_be_part_of_a_stop_text_is_shown_at_once():
    ids = LETTERS("abxab", add_special_tokens=False).input_ids
    assert stream(LETTERS, ids, ["abc"]) == ["", "", "abx", "", "", "ab"]


def test_special_tokens_are_no_text():
    assert stream(LETTERS, [1, *LETTERS("a", add_special_tokens=False).input_ids, 0]) == ["", "a", "", ""]
