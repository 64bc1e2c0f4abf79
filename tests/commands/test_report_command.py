"""`mixora report`: from a run's record, from a trainer's checkpoint, and what it refuses."""

import json
import re

import pytest
from peft import get_peft_model
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from mixora.diagnostics.checkpoint import find_record
from mixora.diagnostics.record import RunRecord, read_record, write_record
from mixora.diagnostics.report import render, write_report
from mixora.errors import CheckpointError
from tests.diagnostics.records import HOSTILE, make_large_record
from tests.models import tiny_llama
from tests.training.setups import make_trainer

NAMES = dict.fromkeys(["title", "recipe", "base", "data", "created", "command", "next_command"], "x")


def call(*words):
    return CliRunner().invoke(app, ["report", *map(str, words)])


def headings(page):
    return re.findall("<h2.*?>(.*?)</h2>", page.read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path):
    write_record(make_large_record(layers=3), tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    adapter = mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM")
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01, "max_steps": 4}
    make_trainer(mixora.Trainer, folder, model=get_peft_model(tiny_llama(), adapter), **settings).train()
    return folder


def test_the_page_is_made_anew_and_is_the_one_that_training_writes(run):
    (run / "report.html").write_text("old")
    result = call(run)
    assert result.exit_code == 0, result.output
    assert "warning: 1 of 18 sites has collapsed" in result.output and str(run / "report.html") in result.output
    first = (run / "report.html").read_text()
    assert first == write_report(read_record(run), run / "other").read_text()
    assert {path.name for path in run.iterdir()} == {"record.json", "report.html", "other"}


def test_every_section_is_there(run):
    call(run)
    assert headings(run / "report.html") == [
        "Parameters",
        "Before and after",
        "Are the routers well?",
        "Training",
        "Routers during training",
        "Load of the experts",
        "Routers over depth",
        "Who reads what",
        "Typical tokens",
        "Experts alike",
        "What the model says",
        "Plan",
        "Your own data",
        "How it was made",
    ]


def test_another_file_is_never_replaced_by_accident(run):
    page = run / "pages" / "mine.html"
    result = call(run, "--out", page, "--json")
    told = json.loads(result.stdout)
    assert told["report"] == str(page) and page.is_file() and not (run / "report.html").exists()
    assert [finding["kind"] for finding in told["routers"]] == ["warning"] * 3
    assert all(finding["advice"] for finding in told["routers"])
    again = call(run, "--out", page)
    assert again.exit_code == 2 and "is there already; valid: another file, or --overwrite" in again.output
    assert call(run, "--out", page, "--overwrite").exit_code == 0
    assert "valid: another file" in call(run, "--out", run, "--overwrite").output
    assert "cannot be written" in call(run, "--out", page / "below.html").output


def test_a_checkpoint_of_a_trainer_gives_curves_plan_and_parameters(checkpoint):
    result = call(checkpoint)
    assert result.exit_code == 0, result.output
    page = checkpoint / "report.html"
    assert headings(page) == ["Parameters", "Training", "Routers during training", "Plan"]
    record = find_record(checkpoint)
    assert record.title == f"Checkpoint checkpoint-4 of {checkpoint.name}"
    assert [row["step"] for row in record.history] == [1, 2, 3, 4]
    assert {"loss", "load_balance", "routing/entropy"} <= record.history[0].keys()
    assert record.recipe == "sira" and len(record.plan) == 8
    assert [row["step"] for row in find_record(checkpoint / "checkpoint-2").history] == [1, 2]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither record.json nor trainer_state.json; valid: the folder that `mixora train` wrote"),
        ({"record.json": "{"}, "record.json: not a run record"),
        ({"trainer_state.json": "{"}, "trainer_state.json: not readable as JSON"),
        ({"trainer_state.json": "[]"}, "not readable as JSON: got list; valid: an object of settings"),
        ({"trainer_state.json": "{}", "adapter_config.json": '{"plan": [{}]}'}, "stored plan is damaged"),
    ],
)
def test_mistakes_are_named(files, message, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    result = call(tmp_path)
    assert result.exit_code == 2 and message in result.output
    with pytest.raises(CheckpointError, match=re.escape(message)):
        find_record(tmp_path)


def test_a_log_with_odd_lines_is_read_as_far_as_it_goes(tmp_path):
    log = [
        {"loss": float("nan"), "step": 1},
        {"loss": "low", "step": 2},
        {"eval_loss": 1.0, "step": 2},
        {"loss": 1.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert [row["loss"] for row in find_record(tmp_path).history] == [None, None]
    assert call(tmp_path).exit_code == 0


def test_a_record_of_an_earlier_version_leaves_sections_out(tmp_path):
    routing = {"path": "layers.0.q", "experts_per_token": 2.0, "entropy": 1.2, "dropped_share": 0.0}
    older = {
        **NAMES,
        "routing": [{**routing, "dead_experts": [], "load": [0.5, 0.5]}],
        "history": [{"step": 1, "loss": 2}],
    }
    (tmp_path / "record.json").write_text(json.dumps(older))
    assert call(tmp_path).exit_code == 0
    page = tmp_path / "report.html"
    assert "Typical tokens" not in headings(page) and "Load of the experts" in headings(page)
    assert "Entropy of the router" not in page.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"typical": [{"path": "q", "expert": 0, "usual": 0.1, "tokens": [{"text": 3}]}]}, r"typical\.0\.tokens\.0"),
        ({"similar": [{"path": "q", "first": "a", "second": 1, "cosine": 1, "correlation": 1}]}, r"similar\.0\.first"),
        ({"routing": [{"path": "q", "load": "even"}]}, r"routing\.0\.load"),
        ({"routing": [{"path": "q", "colour": "red"}]}, r"routing\.0\.colour"),
        ({"load": {"groups": ["a"], "sites": ["q"], "load": [0.5]}}, r"load\.load\.0"),
    ],
)
def test_a_damaged_record_says_where(change, message, tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({**NAMES, **change}))
    with pytest.raises(CheckpointError, match=f"not a run record: {message}"):
        read_record(tmp_path)


def test_hostile_tokens_and_groups_are_text_and_nothing_else(run):
    page = render(make_large_record(layers=2))
    tags = {tag for tag in re.findall(r"<([a-z0-9]+)[ >/]", page) if tag not in page_tags()}
    assert not tags
    assert "&lt;script&gt;alert" in page and "<script" not in page and HOSTILE not in page
    assert "\\u202ex" in page and "\N{RIGHT-TO-LEFT OVERRIDE}" not in page


def page_tags():
    plain = "html head meta title style body nav a h1 h2 h3 p b i ul li details summary pre code span div figure "
    return (plain + "figcaption svg path table thead tbody tr th td dl dt dd").split()


def test_a_bare_record_makes_a_page():
    assert "<h2" in render(RunRecord(**NAMES))
