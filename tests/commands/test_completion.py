"""What the shell offers, and that neither it nor help imports a heavy library."""

import os
import subprocess
import sys
import time
from typing import get_args

import pytest
import typer
from typer.main import get_command
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from mixora.commands import completion
from mixora.commands.completion import SECTIONS, adapter_settings, complete_run, complete_setting, recipes
from mixora.config import Strict
from mixora.short_names import SHORT_NAMES
from mixora.training.run_config import AdapterSection, RunConfig

HEAVY = ("torch", "transformers", "peft", "trl", "datasets", "numpy", "matplotlib")
PROGRAM = f"""
import sys, mixora_command
sys.argv[0] = "mixora"
try:
    mixora_command.main()
finally:
    sys.stderr.write(" ".join(name for name in {HEAVY!r} if name in sys.modules))
"""


def offered(words, folder=None):
    """The answers of the program to TAB after `words`, and the heavy libraries that it imported."""
    return call_program([], folder, COMP_WORDS=f"mixora {words}", COMP_CWORD=str(len(words.split(" "))))


def call_program(words, folder=None, **environment):
    completes = {"_MIXORA_COMPLETE": "complete_bash"} if environment else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **completes, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.split("\n")[:-1], done.stderr.split()


@pytest.fixture
def runs(tmp_path):
    for name in ("runs/first", "runs/second", "runs/deep/er/third", "runs/first/inside", "runs/.hidden"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.yaml").write_text("")
    (tmp_path / "runs" / "other").mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("tra", ["train"]),
        ("train --recipe adamo", ["adamoe", "adamole"]),
        ("recipes hil", ["hilo"]),
        ("train --model sm", ["smollm2-135m-instruct"]),
        ("plan train.st", ["train.steps="]),
        ("train adapter.num_e", ["adapter.num_experts="]),
        ("train --recipe hilo adapter.rules.linears.expert.r", ["adapter.rules.linears.expert.rank="]),
        ("evaluate runs/f", ["runs/first"]),
        ("train --resume ", ["runs/first", "runs/second"]),
        ("export runs/d", ["runs/deep/er/third"]),
        ("export runs/first --to st", ["standalone"]),
        ("export runs/first --to hub --form a", ["averaged", "adapter"]),
        ("evaluate nowhere/x", []),
    ],
)
def test_tab_offers(words, expected, runs):
    found, imported = offered(words, runs)
    assert [word for word in found if word] == expected
    assert imported == []


def test_benchmarks_are_offered_in_a_checkout():
    found, imported = offered("bench s")
    assert {"step", "scaling"} <= set(found) and imported == []


def test_help_is_quick():
    started = time.perf_counter()
    told, imported = call_program(["--help"])
    assert any("mixora train" in line for line in told) and imported == []
    # about 0.15 s; a busy machine is slower, torch alone takes longer
    assert time.perf_counter() - started < 5


def test_python_gets_the_whole_face_at_once_and_nothing_that_needs_triton():
    program = """
import mixora, sys
from peft import mapping
import mixora.kernels.triton
print("MIXORA" in mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "mixora.kernels.launches" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr
    assert set(mixora.__all__) <= set(dir(mixora))
    assert all(callable(getattr(mixora, name)) for name in mixora.__all__)


def test_what_is_read_without_imports_is_what_there_is():
    assert tuple(recipes()) == mixora.recipe_names()
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    models = {name: kind for name, kind in sections.items() if isinstance(kind, type) and issubclass(kind, Strict)}
    assert models.keys() == SECTIONS.keys()
    expected = {f"{name}=" for name in sections.keys() - models.keys()}
    expected |= {f"{section}.{field}=" for section, kind in models.items() for field in kind.model_fields}
    context = typer.Context(get_command(app))
    assert set(complete_setting(context, "")) == expected
    assert set(SHORT_NAMES) == {"smollm2-135m-instruct", "minilm-l6"}


@pytest.mark.parametrize("recipe", recipes())
@pytest.mark.parametrize("dotted", [False, True])
def test_offered_settings_of_an_adapter_are_accepted(recipe, dotted):
    dumped = mixora.recipe(recipe).method.model_dump(mode="json")
    for name in adapter_settings(recipe, dotted):
        value = _first_value(dumped, name)
        assert AdapterSection(recipe=recipe, **{name: value}).build().recipe == recipe


def _first_value(tree, name):
    """The value of a dotted path, or of the first place that has such a last name."""
    head, _, rest = name.partition(".")
    if isinstance(tree, dict) and head in tree:
        return _first_value(tree[head], rest) if rest else tree[head]
    found = [_first_value(child, name) for child in tree.values() if isinstance(child, dict)] if not rest else []
    return next((value for value in found if value is not None), None)


def test_a_script_for_the_shell_is_offered():
    text = CliRunner().invoke(app, ["--help"]).output
    assert "--install-completion" in text


def test_a_tree_of_many_folders_is_searched_in_part(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert complete_run("runs/") == ["runs/deep/er/third", "runs/first", "runs/second"]
    monkeypatch.setattr(completion, "MOST_FOLDERS", 1)
    assert complete_run("runs/") == ["runs/first", "runs/second"]


def test_every_form_of_an_export_is_offered():
    from mixora.cards import CardForm
    from mixora.commands.completion import DESTINATIONS

    assert set(DESTINATIONS) == {*get_args(CardForm), "hub"}
