import dataclasses
import json
import math
import re
from html.parser import HTMLParser

import pytest

from mixora.diagnostics.page import format_value
from mixora.diagnostics.record import RunRecord, read_record
from mixora.diagnostics.report import describe_loss, got_worse, summarise, write_report
from mixora.errors import CheckpointError
from tests.diagnostics.records import HOSTILE

NAMES = {"title": "A run", "recipe": "sira", "base": "tiny", "data": "made up", "created": "2026-01-02T03:04:05Z"}
SCORES = {"loss": 0.25, "exact_match": 0.9, "rows": 105}


def make_record(**changes):
    record = RunRecord(
        **NAMES,
        command="mixora train run.yaml",
        next_command="mixora train run.yaml data.train=mine.jsonl",
        plan=[{"path": "layers.0.up", "shape": [8, 16], "experts": 4, "rank": 2, "top_k": 2, "router": "capacity"}],
        parameters={"total": 1_000_000, "trainable": 10_000, "active": 5_000},
        before={"loss": 4.0, "exact_match": 0.0, "rows": 105},
        after=SCORES,
        reloaded=SCORES,
        history=[{"step": 1, "loss": 4.0, "balance": 1.5}, {"step": 2, "loss": 0.5, "balance": 1.25}],
        load={"groups": ["a", "b"], "sites": ["layers.0.up"], "load": [[[0.5, 0.5], [0.25, 0.75]]]},
        routing=[
            {"path": "layers.0.up", "entropy": 1.2, "dropped_share": 0.05, "dead_experts": [], "load": [0.4, 0.6]}
        ],
        generations=[{"prompt": "dim it", "expected": "dim()", "before": "No.", "after": "dim()"}],
        environment={"torch": "2.13", "seconds": 12.5},
        notes=["A note."],
    )
    return dataclasses.replace(record, **changes)


class Reader(HTMLParser):
    """Collects tags, attributes and text, and checks that every tag is closed in order."""

    VOID = ("meta", "img")

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.links, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)


def read_page(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert reader.open == []
    return reader


def test_page_holds_everything_and_fetches_nothing(tmp_path):
    page = write_report(make_record(), tmp_path / "new" / "folder")
    assert {path.name for path in page.parent.iterdir()} == {
        "report.html",
        "record.json",
        "loss.png",
        "expert_load.png",
    }
    reader = read_page(page)
    assert "script" not in reader.tags
    assert all(link.startswith("#") for link in reader.links)
    assert not re.search(r"url\(|@import|https?://", page.read_text())
    text = " ".join(reader.text)
    for part in ("A note.", "as expected", "8 → 16", "1.00%", "5.0%", "data.train=mine.jsonl", "2.13", "90.0%"):
        assert part in text, part


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    hostile = make_record(
        **dict.fromkeys(["title", "recipe", "base", "data", "created", "command", "next_command"], HOSTILE),
        plan=[{"path": HOSTILE, HOSTILE: HOSTILE}],
        parameters={HOSTILE: 3},
        before={HOSTILE: 1.0},
        after={HOSTILE: 2.0},
        routing=[{"path": HOSTILE, "dead_experts": [], "load": [1.0]}],
        generations=[dict.fromkeys(["prompt", "expected", "before", "after"], HOSTILE)],
        environment={HOSTILE: HOSTILE},
        notes=[HOSTILE],
    )
    page = write_report(hostile, tmp_path)
    plain, reader = read_page(write_report(make_record(), tmp_path / "plain")), read_page(page)
    assert set(reader.tags) <= set(plain.tags)
    assert all(link.startswith("#") for link in reader.links)
    assert "".join(reader.text).count(HOSTILE) >= 16


def test_record_comes_back_as_it_was(tmp_path):
    record = make_record(title=HOSTILE)
    write_report(record, tmp_path)
    assert read_record(tmp_path) == record


def test_bare_record_has_no_empty_sections(tmp_path):
    write_report(make_record(), tmp_path)
    bare = RunRecord(**NAMES, command="c", next_command="n")
    page = write_report(bare, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "record.json"}
    assert re.findall("<h2.*?>(.*?)</h2>", page.read_text()) == ["Your own data", "How it was made"]
    assert "No scores were taken." in page.read_text()
    assert read_record(tmp_path) == bare


@pytest.mark.parametrize("part", ["load", "generations", "history", "routing", "plan", "reloaded"])
def test_each_part_may_be_missing(part, tmp_path):
    empty = None if part in ("load", "reloaded") else []
    record = make_record(**{part: empty})
    read_page(write_report(record, tmp_path))
    assert read_record(tmp_path) == record


def test_a_load_without_sites_draws_nothing(tmp_path):
    write_report(make_record(load={"groups": [], "sites": [], "load": []}), tmp_path)
    assert not (tmp_path / "expert_load.png").exists()


def test_numbers_that_are_not_finite_leave_valid_json(tmp_path):
    record = make_record(
        after={"loss": math.nan},
        history=[{"step": 1, "loss": math.inf}],
        routing=[{"path": "up", "load": [math.nan, 1.0]}],
    )
    write_report(record, tmp_path)
    plain = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert plain["after"] == {"loss": None}
    write_report(read_record(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("changes", "verdict", "worse"),
    [
        (
            {},
            "Loss 4 → 0.25, exact match 0.0% → 90.0% on 105 held-out rows. "
            "Read back from disk, the adapter gives the same numbers.",
            False,
        ),
        ({"reloaded": None}, "Loss 4 → 0.25, exact match 0.0% → 90.0% on 105 held-out rows.", False),
        ({"reloaded": None, "after": {"loss": 5.0}}, "Loss 4 → 5 (worse).", True),
        ({"reloaded": None, "after": {"loss": 4.0}}, "Loss 4 → 4 (unchanged).", False),
        ({"reloaded": None, "before": {}, "after": {"bleu": 31.5}}, "Bleu 31.5.", False),
        ({"reloaded": None, "after": {"loss": math.nan}}, "Loss is not a finite number after training.", True),
        (
            {"after": {"loss": 0.25}, "reloaded": {"loss": 0.5}},
            "Loss 4 → 0.25. Read back from disk, the adapter differs in loss.",
            True,
        ),
        (
            {"after": {"loss": 0.25}, "reloaded": {"loss": 0.25 * (1 + 1e-6)}},
            "Loss 4 → 0.25. Read back from disk, the adapter gives the same numbers.",
            False,
        ),
    ],
)
def test_verdict_follows_from_the_numbers(changes, verdict, worse, tmp_path):
    record = make_record(**changes)
    assert summarise(record) == verdict
    assert got_worse(record) is worse
    assert ('class="verdict bad"' in write_report(record, tmp_path).read_text()) is worse


def test_the_loss_in_words():
    history = [{"step": 1, "loss": 4.0}, {"step": 1200, "loss": None}]
    assert describe_loss(history) == "Training loss: 4 at step 1, \N{EN DASH} at step 1200."
    assert describe_loss(history[:1]) == "Training loss: 4 at step 1."
    assert describe_loss([]) == ""


@pytest.mark.parametrize(
    ("dead", "words", "summary"),
    [
        ([], "none", "At the one site every expert is used; no router has collapsed."),
        ([3], "3 gets no tokens", "1 of 1 site has an expert that no token reaches (up: expert 3)."),
        ([0, 2, 5], "0, 2 and 5 get no tokens", "an expert that no token reaches (up: experts 0, 2, 5)."),
    ],
)
def test_dead_experts_are_put_in_words(dead, words, summary, tmp_path):
    text = write_report(make_record(routing=[{"path": "up", "dead_experts": dead}]), tmp_path).read_text()
    assert f"<td>{words}</td>" in text
    assert summary in text


@pytest.mark.parametrize(
    ("value", "name", "text"),
    [
        (1234567, "", "1,234,567"),
        (0.98765, "exact_match", "98.8%"),
        (0.98765, "f1", "0.988"),
        (12345.6, "perplexity", "12,346"),
        (None, "loss", "\N{EN DASH}"),
        (math.inf, "loss", "\N{EN DASH}"),
        ([576, 1536], "shape", "576 → 1,536"),
        ([1, 2], "dead", "1, 2"),
        (True, "", "True"),
    ],
)
def test_values_are_formatted_for_reading(value, name, text):
    assert format_value(value, name) == text


def damage(**changes):
    return json.dumps({**dataclasses.asdict(make_record()), **changes})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"record\.json: not a run record: file: Invalid JSON"),
        ("[]", r"record\.json: not a run record: file: "),
        ("{}", r"title: Field required.*recipe: Field required"),
        (damage(colour="red"), "not a run record: colour: Unexpected keyword argument"),
        (damage(after={"loss": "low"}), r"after\.loss: Input should be a valid number"),
        (damage(history=[1]), r"history\.0: Input should be (a valid dictionary|an object)"),
        (damage(history=[{"step": -1}]), "history: .* got a step that is none; valid: a number from 0"),
        (damage(history=[{"step": 2**63}]), "got a step that is none"),
        (damage(tasks={"a": {"before": {}}}), "tasks: .* got a task without scores; valid: before and after of each"),
        (
            damage(load={"groups": ["a"], "sites": ["q"], "load": [[[0.5], [0.5]]]}),
            "got a table of another size than sites and groups have",
        ),
        (
            damage(load={"groups": ["a", "b"], "sites": ["q"], "load": [[[1.0], [0.5, 0.5]]]}),
            "got groups with unequal numbers of experts; valid: one number at a site",
        ),
    ],
)
def test_damaged_records_say_where(content, message, tmp_path):
    (tmp_path / "record.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        read_record(tmp_path)


def test_missing_record_names_the_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"record\.json: no such file; valid: a folder that holds a report"):
        read_record(tmp_path)
