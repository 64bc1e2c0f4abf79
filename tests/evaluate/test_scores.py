import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixora.errors import DataError
from mixora.evaluate import SCORES
from mixora.evaluate.scores import (
    answer_accuracy,
    bleu,
    exact_match,
    intent_accuracy,
    parse_call,
    read_answer,
    rouge_l,
    slot_f1,
)

CALL = "travel(from=corby; day=thursday)"


def test_calls_are_parsed():
    assert parse_call(f" {CALL}\n") == ("travel", {("from", "corby"): 1, ("day", "thursday"): 1})
    assert parse_call("stop()") == ("stop", {})
    assert parse_call("play(song=call me (maybe); by=a=b)") == (
        "play",
        {("song", "call me (maybe)"): 1, ("by", "a=b"): 1},
    )
    for text in ("", "travel", "travel(from=corby", "(a=b)", "travel(from)", "travel(=x)", "travel(a=b;)"):
        assert parse_call(text) is None


def test_exact_match_takes_any_reference_and_any_spacing():
    assert exact_match(["a  b\n", "c", "D"], [["x", "a b"], ["c"], ["d"]]) == pytest.approx(2 / 3)


def test_intent_is_the_text_before_the_bracket():
    assert intent_accuracy(["travel(broken", "stay()", "travel"], [[CALL]] * 3) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("predictions", "references", "expected"),
    [
        ([CALL], [[CALL]], 1.0),
        (["travel(from=corby; day=friday)"], [[CALL]], 0.5),
        (["other(from=corby)"], [[CALL]], 2 / 3),
        (["travel(from=corby; from=corby)"], [[CALL]], 0.5),
        ([CALL[:-1]], [[CALL]], 0.0),
        (["stop()"], [["stop()"]], 1.0),
        (["stop()", CALL], [[CALL], [CALL]], 2 / 3),
        ([CALL], [["stop(a=b)", CALL]], 1.0),
    ],
)
def test_slot_f1(predictions, references, expected):
    assert slot_f1(predictions, references) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("20 * 3 = 60\n#### 60", Decimal(60)),
        ("#### 1 so far\n#### -1,234.50 in all\nand 7 more", Decimal("-1234.5")),
        ("#### all of them\n3", "all of them"),
        ("so it takes 5 days and costs $1,200.", Decimal(1200)),
        ("from 10-3 we get .5", Decimal("0.5")),
        ("12,345,678km by v2.0, a1", Decimal(12345678)),
        ("####", None),
        ("nothing\n", None),
    ],
)
def test_the_final_answer_is_read(text, answer):
    assert read_answer(text) == answer


def test_worked_answers_are_compared_by_what_they_come_to():
    right = ["so $1,200", "#### 1200.0 dollars", "#### none"]
    wrong = ["1200, or 7", "no number", "#### some"]
    references = [["so\n#### 1200"], ["#### 3", "#### 1,200"], ["#### none"]]
    assert answer_accuracy(right, references) == 1.0
    assert answer_accuracy(wrong, references) == 0.0


def test_answers_are_those_that_a_real_set_gives_in_a_field_of_their_own(shared_data):
    """GSM8K, whose makers tell the answer apart."""
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()]
    assert [read_answer(row["completion"]) for row in rows] == [Decimal(row["answer"].replace(",", "")) for row in rows]


SLOTS = st.sets(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=5)


@given(pairs=st.lists(st.tuples(SLOTS, SLOTS), min_size=1, max_size=6))
def test_slot_f1_is_the_harmonic_mean_of_precision_and_recall(pairs):
    def call(slots):
        return f"f({'; '.join(f'{name}={value}' for name, value in sorted(slots))})"

    hits = sum(len(p & r) for p, r in pairs)
    predicted, wanted = (sum(len(pair[side]) for pair in pairs) for side in (0, 1))
    got = slot_f1([call(p) for p, _ in pairs], [[call(r)] for _, r in pairs])
    if hits:
        precision, recall = hits / predicted, hits / wanted
        assert got == pytest.approx(2 * precision * recall / (precision + recall))
    else:
        assert got == (0.0 if predicted + wanted else 1.0)


def test_bleu_and_rouge_take_unlike_numbers_of_references():
    text = "the quick brown fox jumps"
    assert bleu([text, text], [["nothing like it", text], [text]]) == pytest.approx(100)
    assert 0 < bleu(["the quick brown cat sleeps"], [[text]]) < 100
    assert rouge_l([text, "the fox"], [["no", text], [text]]) == pytest.approx((1 + 4 / 7) / 2)


@pytest.mark.parametrize("name", SCORES)
def test_scores_need_references(name):
    with pytest.raises(DataError, match="got 0 predictions and 0 rows of references"):
        SCORES[name]([], [])
    with pytest.raises(DataError, match="got 1 predictions and 2 rows"):
        SCORES[name](["a"], [["a"], ["a"]])
    with pytest.raises(DataError, match="row 2 has no reference"):
        SCORES[name](["a", "b"], [["a"], []])
