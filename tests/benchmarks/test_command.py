"""`mixora bench`: the list, the options handed on, and what a user is told where it cannot run."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from benchmarks import BENCHMARKS, running
from mixora.cli import app
from mixora.commands import bench


def call(*words):
    return CliRunner().invoke(app, ["bench", *words])


@pytest.mark.parametrize("words", [[], ["--help"]])
def test_without_a_name_benchmarks_are_listed(words):
    result = call(*words)
    assert result.exit_code == 0
    for name in BENCHMARKS:
        assert f"│ {name} " in result.output


def test_options_are_the_benchmarks_own(monkeypatch):
    given = []
    monkeypatch.setattr(running, "run", lambda *words: given.append(words))
    assert call("step", "--dtype", "float32", "bfloat16", "--repeats", "3").exit_code == 0
    assert given == [("step", ["--dtype", "float32", "bfloat16", "--repeats", "3"])]


def test_the_script_gives_benchmarks_the_whole_face():
    program = """
import sys, mixora_command
sys.argv = ["mixora", "bench", "step"]
from benchmarks import running
def run(name, options):
    import mixora
    print(name, mixora.recipe("sira").recipe, callable(mixora.plan), mixora.Plan.__name__)
running.run = run
mixora_command.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["step", "sira", "True", "Plan"], done.stderr


def test_help_of_a_benchmark():
    result = call("decode", "--help")
    assert result.exit_code == 0
    assert "usage: mixora bench decode" in result.output and "--batch" in result.output


def test_an_unknown_name_is_a_users_mistake():
    result = call("stpe")
    assert result.exit_code == 2
    assert "got 'stpe'" in result.output and "did you mean 'step'?" in result.output


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """As from a wheel."""
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "lib" / "site-packages" / "mixora" / "commands" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_outside_of_a_checkout_there_are_none(installed):
    result = call("step")
    assert result.exit_code == 2
    assert "they come with the repository, not with the package" in result.output


def test_the_working_directory_may_be_the_checkout(installed, monkeypatch):
    (installed / "src" / "mixora").mkdir(parents=True)
    (installed / "benchmarks").mkdir()
    (installed / "benchmarks" / "measuring.py").touch()
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr(bench.importlib, "import_module", lambda name: name)
    assert bench.import_benchmarks() == "benchmarks"
    assert bench.sys.path == [str(installed)]
