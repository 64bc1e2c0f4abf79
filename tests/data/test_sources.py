import csv
import json

import datasets
import pytest

from mixora.data import FORMS, read_rows, splits_of
from mixora.errors import DataError

COMPLETION = {"prompt": "2+2", "completion": "4"}
CHOICE = {"question": "which?", "choices": ["a", "b"], "answer": 1}
MESSAGES = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
EXAMPLES = {
    "completion": COMPLETION | {"references": ["4", "four"], "domain": "sums"},
    "messages": MESSAGES,
    "text": {"text": "once"},
    "classification": {"text": "fine", "label": "good"},
    "pair": {"text": "a", "text_pair": "b", "label": 0},
    "choice": CHOICE | {"context": "here"},
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_is_told_from_its_fields_and_keeps_extra_ones(write, form):
    row = EXAMPLES[form] | {"lang": "en"}
    rows = read_rows(write("rows.jsonl", [row]))
    assert rows.form == form
    assert rows[0]["lang"] == "en"
    assert {k: v for k, v in rows[0].items() if k != "label"} == {k: v for k, v in row.items() if k != "label"}


def _write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_file_type_gives_the_same_rows(write, tmp_path, suffix, form):
    row = EXAMPLES[form]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".csv":
        _write_csv(path, [row, row])
    elif suffix == ".parquet":
        datasets.Dataset.from_list([row, row]).to_parquet(path)
    else:
        write(path.name, [row, row])
    rows = read_rows(path)
    expected = read_rows(write("expected.jsonl", [row, row]))
    assert rows.rows == expected.rows
    assert (rows.form, rows.labels) == (expected.form, expected.labels)


def test_rows_are_an_immutable_sequence(write):
    rows = read_rows(write("rows.jsonl", [COMPLETION, COMPLETION | {"prompt": "1"}]))
    assert len(rows) == 2
    assert [row["prompt"] for row in rows] == ["2+2", "1"]
    assert rows[1:] == (rows[1],)
    with pytest.raises(AttributeError):
        rows.form = "text"


def test_limit_takes_the_first_rows_and_looks_at_no_more(write):
    path = write("rows.jsonl", b'{"text": "a"}\n\n{"text": "b"}\r\nbroken\n')
    assert [row["text"] for row in read_rows(path, limit=2)] == ["a", "b"]
    with pytest.raises(DataError, match="limit: got 0; valid: 1 or more"):
        read_rows(path, limit=0)


def test_bom_and_null_fields_are_understood(write):
    path = write("rows.jsonl", b'\xef\xbb\xbf{"text": "a", "label": null}\n')
    assert read_rows(path).form == "text"


def test_an_empty_cell_of_a_list_is_no_list(write):
    (row,) = read_rows(write("rows.csv", b"prompt,completion,references\na,b,\n"))
    assert (row["prompt"], row["completion"], row.get("references")) == ("a", "b", None)


def test_folder_splits_come_in_the_usual_order(write, tmp_path):
    for name in ("test.csv", "unseen.jsonl", "train.jsonl", "validation.json"):
        write(name, b'[{"text": "a"}]' if name.endswith("json") else b"text\na\n" if "csv" in name else b'{"text":"a"}')
    write("meta.json", {"labels": None})
    write("tasks.json", {"a": "b"})
    assert splits_of(tmp_path) == ("train", "validation", "test", "unseen")
    for split in splits_of(tmp_path):
        assert read_rows(str(tmp_path), split)[0]["text"] == "a"


def test_a_file_has_one_split(write):
    path = write("rows.jsonl", [COMPLETION])
    assert splits_of(path) == ("train",)
    with pytest.raises(DataError, match=r"has no split 'test' \(known: train\)"):
        read_rows(path, "test")


def test_class_names_come_from_meta_then_from_the_train_split(write, tmp_path):
    write("train.jsonl", [{"text": "a", "label": name} for name in ("low", "high", "mid")])
    write("test.jsonl", [{"text": "a", "label": "mid"}])
    assert read_rows(tmp_path, "test").labels == ("high", "low", "mid")
    assert read_rows(tmp_path, "test")[0]["label"] == 2
    assert read_rows(tmp_path, limit=1).labels == ("high", "low", "mid")
    write("meta.json", {"labels": ["low", "mid", "high"]})
    assert read_rows(tmp_path, "test")[0]["label"] == 1
    assert read_rows(tmp_path, "test", labels=["mid", "low", "high"])[0]["label"] == 0


def test_class_numbers_and_floats(write, tmp_path):
    write("train.jsonl", [{"text": "a", "label": number} for number in (0, 2)])
    write("test.jsonl", [{"text": "a", "label": 1}])
    assert read_rows(tmp_path, "test").labels == ("0", "1", "2")
    write("train.jsonl", [{"text": "a", "text_pair": "b", "label": value} for value in (3, 2.5)])
    rows = read_rows(tmp_path)
    assert rows.labels is None
    assert [row["label"] for row in rows] == [3.0, 2.5]
    assert all(isinstance(row["label"], float) for row in rows)


BAD = [
    ({"prompt": "a"}, "lacks 'completion'"),
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": 3, "completion": "b"}, "'prompt' is the number 3; valid: text"),
    (COMPLETION | {"references": "four"}, "'references' is not a list of texts"),
    (COMPLETION | {"references": []}, "with at least one member"),
    ([1], "is a list; valid: an object with fields"),
    (MESSAGES | {"messages": "hi"}, "'messages' is text; valid: a list"),
    (MESSAGES | {"messages": [{"role": "user"}]}, "message 1 is not an object with 'role' and 'content'"),
    (MESSAGES | {"messages": [{"role": "bot", "content": "x"}]}, "message 1 has the role 'bot'; valid: system"),
    (MESSAGES | {"messages": [{"role": "user", "content": " "}]}, "message 1: 'content' is empty"),
    (MESSAGES | {"messages": MESSAGES["messages"][:1]}, "end with the assistant's answer"),
    ({"text": "a", "label": True}, "'label' is true or false; valid: a class name"),
    ({"text": "a", "label": ""}, "'label' is empty"),
    ({"text": "a", "label": float("nan")}, "is not JSON: NaN is no number there"),
    (CHOICE | {"answer": 2}, "'answer' is 2; valid: 0 to 1"),
    (CHOICE | {"answer": -1}, "'answer' is -1; valid: 0 to 1"),
    (CHOICE | {"answer": "b"}, "'answer' is text; valid: the index"),
    (CHOICE | {"choices": ["a", ""]}, "'choices' has a member that is empty or not text"),
    (CHOICE | {"choices": ["b", "b"]}, "the right choice 'b' is duplicated"),
    (CHOICE | {"choices": ["b"]}, "'choices' is not a list of at least two texts"),
    (CHOICE | {"context": 3}, "'context' is the number 3; valid: text"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_is_named_with_its_line_and_reason(write, row, reason):
    fields = set(row) if isinstance(row, dict) else {"text"}
    form = next(f for f in reversed(FORMS) if fields & set(FORMS[f].required))
    form = "classification" if form == "pair" else form
    path = write("rows.jsonl", [EXAMPLES[form], row])
    with pytest.raises(DataError, match=r"rows\.jsonl: 1 bad row of 2\n  line 2: .*") as caught:
        read_rows(path, form=form)
    assert reason in str(caught.value)


def test_all_bad_rows_are_counted_and_ten_shown(write):
    path = write("rows.jsonl", [COMPLETION, *[{"prompt": "a"}] * 13])
    with pytest.raises(DataError, match=r"13 bad rows of 14\n(  line .*\n){10}  and 3 more$"):
        read_rows(path)


def test_rows_of_another_form_are_not_taken_along(write):
    path = write("rows.jsonl", [{"text": "a"}, {"text": "b", "label": 1}, {"text": "c"}])
    with pytest.raises(DataError, match="line 2: has the fields of classification among 'text' rows"):
        read_rows(path)
    assert len(read_rows(path, form="text")) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"rows\.jsonl: has no rows"),
        (b"\n\n", r"has no rows"),
        (b'{"text": "a"}\n{"text": \n', "line 2: is not JSON: Expecting value at column"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: is not UTF-8 \(byte 11 of the line\)"),
        (b"[" * 200_000 + b"\n" + b'{"text": "a"}', "line 1: is nested too deeply; valid: at most 100 levels"),
        (b'{"a": 1}\n', "fields a fit no form; valid: completion: prompt, completion; messages"),
        (b'{"text": "a", "prompt": "a", "completion": "b"}\n', r"fit several forms \(completion, text\)"),
        (b'{"text": "a", "label": "x"}\n{"text": "a", "label": 1}\n', r"labels mix names \('x'\) and numbers \(1\)"),
        (b'{"text": "a", "label": -1}\n', "got the class number -1; valid: 0 to 9999"),
        (b'{"text": "a", "label": 10000}\n', "got the class number 10000; valid: 0 to 9999"),
    ],
)
def test_unusable_jsonl(write, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write("rows.jsonl", content))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'{"text": "a"}', "holds one dict; valid: a list of objects, or JSONL"),
        ("rows.json", b'[{"text": "a"},\n{]', "is not JSON: Expecting property name .* at line 2"),
        ("rows.json", b'[{"text":\n "\xff"}]', "line 2 is not UTF-8"),
        ("rows.csv", b"text\na,b\n", "line 2: has more cells than the header has names"),
        ("rows.csv", b'text\n"a', "line 2: is not CSV"),
        ("rows.csv", b'question,choices,answer\nq,"[1",0\n', "line 2: the cell 'choices' is not JSON"),
        ("rows.csv", b"prompt,completion\na,b\nc\n", "line 3: lacks 'completion'"),
        ("rows.csv", b"text,label\n", "has no rows"),
        ("rows.csv", b"text,label\na,1e999\n", "line 2: 'label' is inf; valid: a finite number"),
        ("rows.parquet", b"PAR1 no", "is not Parquet"),
        ("rows.txt", b"a", r"got a \.txt file; valid: \.jsonl, \.json, \.csv, \.parquet"),
        ("rows", b"a", "got a nameless file"),
    ],
)
def test_unusable_files_of_other_types(write, name, content, message):
    with pytest.raises(DataError, match=message):
        read_rows(write(name, content))


def test_missing_things_are_named_with_a_suggestion(write, tmp_path):
    path = write("train.jsonl", [COMPLETION])
    with pytest.raises(DataError, match=r"no such file or folder; did you mean 'train\.jsonl'"):
        read_rows(tmp_path / "trian.jsonl")
    write("validation.jsonl", [COMPLETION])
    with pytest.raises(DataError, match=r"has no split 'valid'; did you mean 'validation'\? \(known: train, valid"):
        read_rows(tmp_path, "valid")
    with pytest.raises(DataError, match=r"form: got 'complete'; did you mean 'completion'"):
        read_rows(path, form="complete")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no split; valid: train, validation, test"):
        read_rows(tmp_path / "empty")
    write("train.csv", b"text\na\n")
    with pytest.raises(DataError, match=r"the split 'train' is in train\.csv and train\.jsonl"):
        splits_of(tmp_path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"labels": ["a", "a"]}, "'labels' is .* valid: a list of distinct class names"),
        ({"labels": "a"}, "'labels' is 'a'"),
        ([], "got list; valid: an object of settings"),
        (b"{", "not readable as JSON"),
    ],
)
def test_unusable_meta(write, tmp_path, meta, message):
    write("train.jsonl", [{"text": "a", "label": "a"}])
    write("meta.json", meta)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("goood", r"line 1: 'label' is 'goood', an unknown class; did you mean 'good'\? \(known: bad, good\)"),
        (2, "line 1: 'label' is 2; valid: 0 to 1, or a class name"),
        (0.5, "line 1: 'label' is 0.5; valid: 0 to 1"),
    ],
)
def test_labels_outside_the_classes(write, label, message):
    with pytest.raises(DataError, match=message):
        read_rows(write("rows.jsonl", [{"text": "a", "label": label}]), labels=["bad", "good"])


def test_a_class_name_among_numbers_to_regress_on(write, tmp_path):
    write("train.jsonl", [{"text": "a", "label": 0.5}])
    write("test.jsonl", [{"text": "a", "label": "good"}])
    with pytest.raises(DataError, match="'label' is 'good'; valid: a number, as in the other rows"):
        read_rows(tmp_path, "test")


@pytest.mark.parametrize(
    ("name", "form", "classes"),
    [
        ("quickstart_own", "completion", None),
        ("banking77", "classification", 77),
        ("paws_wiki", "pair", 2),
        ("stsb", "pair", None),
        ("scienceqa_text", "choice", None),
    ],
)
def test_real_sets_are_read_whole(shared_data, name, form, classes):
    rows = read_rows(shared_data / name, "validation")
    meta = json.loads((shared_data / name / "meta.json").read_text(encoding="utf-8"))
    assert (rows.form, len(rows)) == (form, meta["files"]["validation.jsonl"]["rows"])
    assert (rows.labels and len(rows.labels)) == classes
