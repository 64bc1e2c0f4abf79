"""What is shown while an answer comes, joined, is what the tokenizer gives for the whole."""

from hypothesis import given
from hypothesis import strategies as st

from mixora.answering.text import TextStream
from tests.characters import build_tokenizer
from tests.pieces import byte_tokenizer, word_tokenizer

LETTERS = build_tokenizer()
BYTES = byte_tokenizer()
WORDS = word_tokenizer()


def stream(tokenizer, ids, stops=(), prompt=()):
    text = TextStream(tokenizer, stops, prompt)
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


OTHERS = st.text(st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}"), max_size=6)


@given(st.text("am n\u00e9\u20ac\U0001f600", max_size=12) | OTHERS, st.integers(0, 30))
def test_an_answer_is_what_its_prompt_lacks(said, length):
    """Wherever a text is cut; of a character that the cut goes through, the answer has the whole."""
    for tokenizer in (BYTES, WORDS):
        ids = tokenizer(said).input_ids
        whole, known = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, ids[:length]))
        if not whole.startswith(known):
            known = known.rstrip("\N{REPLACEMENT CHARACTER}")
        assert "".join(stream(tokenizer, ids[length:], prompt=ids[:length])) == whole.removeprefix(known)


def test_words_keep_the_space_before_them():
    prompt, whole = WORDS("my").input_ids, WORDS("my name is").input_ids
    assert stream(WORDS, whole[len(prompt) :], prompt=prompt) == [" name", " is", ""]
    assert stream(WORDS, whole[len(prompt) :], [" i"], prompt) == [" name", ""]
    # the beginning of a text has none
    assert stream(WORDS, whole, prompt=[WORDS.bos_token_id]) == ["my", " name", " is", ""]


def test_bytes_behind_a_whole_character_are_no_character_at_the_end():
    ids = WORDS("é€").input_ids
    assert "".join(stream(WORDS, ids[:-1])) == "é" + 2 * "\N{REPLACEMENT CHARACTER}"


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


@given(st.text("am n€", max_size=12), st.lists(st.text("am n€", min_size=1, max_size=4), max_size=3))
def test_a_stop_text_may_lie_over_tokens_and_their_parts(said, stops):
    for tokenizer in (BYTES, WORDS):
        prompt, ids = tokenizer("my").input_ids, tokenizer(f"my{said}").input_ids
        whole = "".join(stream(tokenizer, ids[len(prompt) :], prompt=prompt))
        shown = "".join(stream(tokenizer, ids[len(prompt) :], stops, prompt))
        assert shown in ([whole[: whole.index(stop)] for stop in stops if stop in whole] or [whole])
        assert not any(stop in shown for stop in stops)


def test_what_cannot_be_part_of_a_stop_text_is_shown_at_once():
    ids = LETTERS("abxab", add_special_tokens=False).input_ids
    assert stream(LETTERS, ids, ["abc"]) == ["", "", "abx", "", "", "ab"]


def test_special_tokens_are_no_text():
    assert stream(LETTERS, [1, *LETTERS("a", add_special_tokens=False).input_ids, 0]) == ["", "a", "", ""]
