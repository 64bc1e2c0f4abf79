"""The command line as a user meets it: results, JSON, messages and exit codes."""

import errno
import json
import os
import runpy
import sys

import pytest
from typer.testing import CliRunner

from mixora.cli import app
from tests.training.conftest import bases, data  # noqa: F401 - fixtures

SMALL = ["adapter.num_experts=4", "adapter.top_k=2", "adapter.rank=2", "train.steps=2", "train.batch_size=4"]
SHORT = ["evaluate.limit=4", "evaluate.max_new_tokens=3"]


@pytest.fixture
def call():
    def run(*words, **options):
        return CliRunner().invoke(app, [str(word) for word in words], **options)

    return run


@pytest.fixture
def trained(call, bases, data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    words = ["--recipe", "sira", "--model", bases / "llama", "--data", data / "commands", "--out", out]
    result = call("train", *SMALL, *SHORT, *words)
    assert result.exit_code == 0, result.output
    return out, result


def test_help_is_a_tutorial(call):
    text = call("--help").output
    commands = ("recipes", "plan", "train", "evaluate", "generate", "inspect", "report", "compare", "export", "doctor")
    for command in commands:
        assert f"mixora {command}" in text
    assert "Exit codes: 0" in text


def test_recipes_are_listed_and_shown(call):
    assert "sira" in call("recipes").output and "lora" in call("recipes").output
    assert json.loads(call("recipes", "--json").output)["sira"]["paper"].endswith("2311.09179")
    shown = json.loads(call("recipes", "sira", "--json").output)
    assert shown["rules"]["attention"]["router"]["num_experts"] == 16
    assert "capacity_factor: 2.0" in call("recipes", "sira").output


def test_plan_without_weights(call, bases):  # noqa: F811
    result = call("plan", "--recipe", "lora", "--model", bases / "llama", "adapter.rank=2", "--json")
    found = json.loads(result.output)
    # q and o: 2 (32 + 32), k and v: 2 (32 + 16), two layers
    assert sum(site["parameters"] for site in found["sites"]) == 2 * (2 * 128 + 2 * 96)
    assert found["memory_bytes"]["adapter_weights"] == 4 * 896
    assert found["memory_bytes"]["peak"] > found["memory_bytes"]["base_weights"] > 0
    text = call("plan", "--recipe", "sira", "--model", bases / "bert", "model.task=sequence-classification").output
    assert "8 sites in bert.encoder.layer" in text and "8 rows of 128 tokens" in text


def test_train_tells_its_results(trained):
    out, result = trained
    for word in ("loss", "before", "after", "read back", "report", "mixora train --recipe sira"):
        assert word in result.output
    assert (out / "report.html").is_file() and (out / "adapter" / "adapter_model.safetensors").is_file()


def test_lines_to_copy_are_whole_however_narrow_the_terminal(call, trained, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    out, _ = trained
    new = tmp_path / ("long " * 20 + "name")
    words = ["train", out / "run.yaml", "train.steps=1", "--out", new]
    assert f"would write to {new}: run.yaml, checkpoints, adapter" in call(*words, "--dry-run").output
    told = call(*words).output
    assert f"adapter  {new / 'adapter'}\nreport   {new / 'report.html'}\nyours    mixora train --recipe sira" in told
    assert f"saved {new / 'adapter'}; reading it back\n" in told
    assert "--out runs/yours\n" in told


def test_run_file_and_changes(call, trained, tmp_path):
    out, _ = trained
    again = tmp_path / "again"
    result = call("train", out / "run.yaml", "train.steps=1", "--out", again, "--json")
    record = json.loads(result.output)
    assert len(record["history"]) == 1 and record["recipe"] == "sira"
    refused = call("train", out / "run.yaml", "--out", again)
    assert refused.exit_code == 2 and "--overwrite" in refused.output
    assert call("train", out / "run.yaml", "train.steps=1", "--out", again, "--overwrite").exit_code == 0


def test_evaluate_generate_and_inspect(call, trained, data):  # noqa: F811
    out, _ = trained
    metrics = json.loads(call("evaluate", out, "--json").output)
    assert metrics["loss"] == json.loads((out / "record.json").read_text())["after"]["loss"]
    assert "slot f1" in call("evaluate", out, "--split", "train").output
    for change in ("adapter.rank=3", "train.steps=9", "out=x", "title=x"):
        refused = call("evaluate", out, change)
        assert refused.exit_code == 2 and "has no effect on a run that is trained" in refused.output
    asked = ["--prompt", "lamp hall", "--prompt", "song folk", "--max-new-tokens", 3]
    answers = json.loads(call("generate", out, *asked, "--compare", "--json").output)
    assert [a["prompt"] for a in answers] == ["lamp hall", "song folk"] and "base" in answers[0]
    piped = call("generate", out, "--max-new-tokens", 3, input="lamp hall\n")
    assert piped.exit_code == 0 and "answer" in piped.output
    sites = json.loads(call("inspect", out, "--json").output)
    assert all(abs(sum(site["load"]) - 1) < 1e-6 for site in sites)
    assert "load per expert" in call("inspect", out).output


def test_export(call, trained, tmp_path):
    out, _ = trained
    refused = call("export", out, "--to", "peft-lora", "--out", tmp_path / "merged")
    assert refused.exit_code == 2 and "--approximate" in refused.output and "router 'topk'" in refused.output
    words = [
        "export",
        out,
        "--to",
        "peft-lora",
        "--out",
        tmp_path / "merged",
        "--approximate",
        "--fit-rows",
        8,
        "--rank",
        2,
    ]
    found = json.loads(call(*words, "--json").output)
    assert {site["rank"] for site in found["sites"]} == {2} and found["changes"]["predictions"] > 0
    assert (tmp_path / "merged" / "README.md").is_file()
    again = call(*words)
    assert again.exit_code == 2 and "is not empty" in " ".join(again.output.split())
    told = call("export", out, "--to", "dense", "--out", tmp_path / "dense", "--approximate", "--fit-rows", 8)
    assert told.exit_code == 0 and "largest error" in told.output
    assert (tmp_path / "dense" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "none.yaml"], "no such file"),
        (["train"], "model: is required"),
        (["train", "steps"], "no such file"),
        (["train", "model.base=x", "data.source=y", "adaptr.rank=2"], "did you mean 'adapter'"),
        (["recipes", "siar"], "did you mean 'sira'"),
        (["evaluate", "nowhere"], "is not the folder of a finished run"),
        (["plan", "--model", "smolm2-135m-instruct"], "did you mean 'smollm2-135m-instruct'"),
        (["generate", "nowhere"], "there is no prompt"),
        (["export", "nowhere", "--to", "peft-lora", "--out", "x"], "has no adapter_config.json"),
        (["export", "nowhere", "--to", "peft-lora", "--out", "x", "--fit-rows", "3"], "valid: with --approximate"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(call, words, message):
    result = call(*words, input="")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_a_fault_is_exit_code_1_and_debug_shows_where(call, monkeypatch):
    def break_down():
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr("mixora.recipes.recipe_names", break_down)
    result = call("recipes")
    assert result.exit_code == 1 and "RuntimeError: the disk is on fire" in result.output
    assert isinstance(call("recipes", "--debug").exception, RuntimeError)


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/a"),
            2,
            "error: runs/a: No space left on device",
        ),
        (KeyboardInterrupt(), 130, "stopped: interrupted; nothing more was written"),
        (ValueError("odd"), 1, "fault: ValueError: odd (--debug shows where; please report it)"),
    ],
)
def test_what_stops_a_command_is_told_in_one_line(call, error, code, told, monkeypatch):
    def stop():
        raise error

    monkeypatch.setattr("mixora.recipes.recipe_names", stop)
    result = call("recipes")
    assert result.exit_code == code and told in " ".join(result.output.split())


def test_other_processes_say_nothing_of_an_interrupt(call, monkeypatch):
    def stop():
        raise KeyboardInterrupt

    monkeypatch.setattr("mixora.recipes.recipe_names", stop)
    monkeypatch.setattr("mixora.commands.terminal.SECONDS_TO_BE_ENDED", 0)
    monkeypatch.setenv("RANK", "1")
    result = call("recipes")
    assert result.exit_code == 130 and result.output == ""


def test_only_the_first_process_shows_results(call, monkeypatch):
    monkeypatch.setattr("mixora.training.run.fit", lambda *_: None)
    result = call("train", "model.base=tiny", "data.source=rows")
    assert result.exit_code == 0 and result.output == ""


class EndedError(BaseException):
    """In place of the end of this process."""


def test_one_process_of_several_ends_at_once(monkeypatch):
    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(sys, "argv", ["mixora", "recipes", "siar"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("mixora", run_name="__main__")
    assert left.value.code == 2
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(EndedError) as ended:
        runpy.run_module("mixora", run_name="__main__")
    assert ended.value.args == (2,)
