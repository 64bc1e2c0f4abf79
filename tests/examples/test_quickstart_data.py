import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "quickstart"
SPLITS = ("train", "validation", "test")
CALL = re.compile(r"(\w+)\((\w+=[^=;()]+(?:; \w+=[^=;()]+)*)\)")


def load_maker():
    spec = importlib.util.spec_from_file_location("quickstart_data", FOLDER / "make_data.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    return maker


def read(split):
    return [json.loads(line) for line in (FOLDER / "data" / f"{split}.jsonl").read_text().splitlines()]


def test_making_again_gives_the_committed_files_byte_for_byte(tmp_path):
    load_maker().main(tmp_path)
    names = sorted(path.name for path in (FOLDER / "data").iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert names == ["meta.json", "test.jsonl", "train.jsonl", "validation.jsonl"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (FOLDER / "data" / name).read_bytes(), name


@pytest.mark.parametrize("field", ["prompt", "completion"])
def test_no_prompt_and_no_answer_occurs_twice(field):
    values = [row[field] for split in SPLITS for row in read(split)]
    assert len(values) == len(set(values)) == 840 + 105 + 280


@pytest.mark.parametrize(("split", "count"), [("train", 120), ("validation", 15), ("test", 40)])
def test_domains_are_balanced(split, count):
    domains = json.loads((FOLDER / "data" / "meta.json").read_text())["domains"]
    assert len(domains) == 7
    assert Counter(row["domain"] for row in read(split)) == dict.fromkeys(domains, count)


@pytest.mark.parametrize("split", SPLITS)
def test_every_completion_is_a_call_of_its_domain(split):
    for row in read(split):
        assert set(row) == {"prompt", "completion", "domain"}
        call = CALL.fullmatch(row["completion"])
        assert call, row
        assert call[1] == row["domain"]
        keys = [pair.split("=")[0] for pair in call[2].split("; ")]
        assert len(keys) == len(set(keys)) >= 2
        assert len(row["prompt"]) <= 64
        assert row["prompt"] == row["prompt"].strip().lower()


def test_articles_and_plurals_are_right():
    wrong = re.compile(
        r"\ba (?:[aeiou](?!ne\b))|\ban [^aeiou]|\ban one|\bone \w+s (?:of|for|on)|\b(?:two|ten) \w+[^s] of\b"
    )
    assert [row["prompt"] for split in SPLITS for row in read(split) if wrong.search(row["prompt"])] == []


def test_every_domain_has_many_frames_and_uses_them_all():
    maker = load_maker()
    prompts = {split: read(split) for split in SPLITS}
    for domain, frames in maker.FRAMES.items():
        assert len(frames) >= 8
        for frame in frames:
            form = re.compile(re.sub(r"\\{\w+\\}", "(.+)", re.escape(frame)))
            used = [row for row in prompts["train"] if row["domain"] == domain and form.fullmatch(row["prompt"])]
            assert len(used) >= 3, frame
