"""What a report shows of the answers, for rows that carry fields of other forms along."""

import pytest

from mixora.evaluate import Evaluation, Examples
from mixora.training.description import list_generations
from tests.training.test_run import run, settings

TALK = [
    {"role": role, "content": text}
    for role, text in [("user", "first"), ("assistant", "one"), ("user", "second"), ("assistant", "two")]
]


@pytest.mark.parametrize(
    ("form", "row", "shown"),
    [
        ("completion", {"prompt": "asked", "completion": "said", "messages": None}, ("asked", "said")),
        ("messages", {"prompt": "first", "messages": TALK}, ("second", "two")),
        ("messages", {"prompt": None, "completion": None, "messages": TALK}, ("second", "two")),
    ],
)
def test_the_last_prompt_stands_beside_its_answer(form, row, shown):
    examples = {"rows": Examples([row], form, tokenizer=None, collator=None)}
    measured = {when: {"rows": Evaluation({}, (when,))} for when in ("before", "after")}
    (found,) = list_generations(examples, measured, 1)
    assert found == {"prompt": shown[0], "expected": shown[1], "before": "before", "after": "after"}


def test_a_run_on_rows_with_an_empty_field_comes_to_its_end(bases, tmp_path):
    row = '{{"prompt": "a{n}", "completion": "b{n}", "messages": null}}\n'
    (tmp_path / "rows.jsonl").write_text("".join(row.format(n=n) for n in range(20)))
    _, record = run(settings(bases / "llama", tmp_path / "rows.jsonl", tmp_path / "out"))
    assert [(found["prompt"], found["expected"]) for found in record.generations] == [("a18", "b18"), ("a19", "b19")]
