"""What people do wrong, on every command: one message that names it, exit code 2, no traceback."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from mixora.cli import app
from mixora.commands.terminal import find_refusal
from tests.training.conftest import bases, command_rows  # noqa: F401 - fixture

SMALL = ["adapter.num_experts=4", "adapter.top_k=2", "adapter.rank=2", "train.steps=1", "train.batch_size=4"]
SHORT = ["evaluate.limit=2", "evaluate.max_new_tokens=2"]
HINTS = ("valid", "known:", "reason:", "no such", "is required", "is damaged", "unknown key", "not readable", "is not")
HINTS += ("has no", "is no ", "a value, not")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words], input="")


def check(words, *named):
    """One message that names what was got, and says what is valid or why not."""
    result = call(*words)
    told = " ".join(result.output.split())
    assert result.exit_code == 2, told
    assert "Traceback" not in told and "fault" not in told
    assert all(str(name) in told for name in named), told
    assert any(hint in told for hint in HINTS), told


@pytest.fixture(scope="module")
def place(bases, tmp_path_factory):  # noqa: F811
    """A folder with rows, a base and a finished run."""
    place = tmp_path_factory.mktemp("place")
    rows = place / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in command_rows(12)))
    shutil.copytree(bases / "llama", place / "base")
    words = ["--recipe", "sira", "--model", place / "base", "--data", rows, "--out", place / "run"]
    assert call("train", *SMALL, *SHORT, *words).exit_code == 0
    return place


def cut(path):
    path.write_bytes(path.read_bytes()[:300])


def put(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def turn_into_folder(path):
    path.unlink()
    path.mkdir()


BROKEN_BASES = {
    "config is no JSON": lambda base: (base / "config.json").write_text("{"),
    "config is a list": lambda base: (base / "config.json").write_text("[]"),
    "config is empty": lambda base: (base / "config.json").write_text("{}"),
    "config is not text": lambda base: (base / "config.json").write_bytes(b"\xff\xfe\x00"),
    "a size is a word": lambda base: put(base / "config.json", hidden_size="big"),
    "no config": lambda base: (base / "config.json").unlink(),
    "sizes of another model": lambda base: put(base / "config.json", hidden_size=40),
    "weights are cut": lambda base: cut(base / "model.safetensors"),
    "weights are a folder": lambda base: turn_into_folder(base / "model.safetensors"),
    "no weights": lambda base: (base / "model.safetensors").unlink(),
    "tokenizer is no JSON": lambda base: (base / "tokenizer.json").write_text("{]"),
}
# what a plan and a rehearsal look at
SEEN_WITHOUT_WEIGHTS = [name for name in BROKEN_BASES if "config" in name or "a word" in name]


@pytest.fixture
def broken_base(place, tmp_path, request):
    base = shutil.copytree(place / "base", tmp_path / "broken")
    BROKEN_BASES[request.param](base)
    return base


@pytest.mark.parametrize("broken_base", BROKEN_BASES, indirect=True)
def test_a_broken_base(broken_base, place, tmp_path):
    out = ["--out", tmp_path / "out"]
    train = ["train", "--recipe", "sira", *SMALL, *SHORT, "--model", broken_base, "--data", place / "rows.jsonl", *out]
    approximate = ["--approximate", "--fit-rows", 4]
    check(train, broken_base)
    check(["craft", "--model", broken_base, *out], broken_base)
    check(["export", place / "run", "--to", "peft-lora", "--model", broken_base, *approximate, *out], broken_base)
    check(["evaluate", place / "run", f"model.base={broken_base}"], broken_base)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken_base", SEEN_WITHOUT_WEIGHTS, indirect=True)
def test_a_broken_base_without_weights(broken_base, place, tmp_path):
    out = ["--out", tmp_path / "out", "--dry-run"]
    check(["plan", "--model", broken_base], broken_base)
    check(["train", "--model", broken_base, "--data", place / "rows.jsonl", *out], broken_base)
    check(["craft", "--model", broken_base, *out], broken_base)
    check(["convert", broken_base, *out], broken_base)


@pytest.mark.parametrize(
    "name", ["nowhere/at/all", "rows.jsonl", "empty", "run/adapter", "a b", "owner/name", "x.gguf"]
)
def test_a_base_that_is_none(name, place, tmp_path):
    (place / "empty").mkdir(exist_ok=True)
    (place / "x.gguf").write_bytes(b"GGUF and no more")
    base = place / name if "/" not in name or name.startswith("run") else name
    base = name if name == "a b" else base
    out = ["--out", tmp_path / "out"]
    check(["plan", "--model", base], base)
    check(["train", "--model", base, "--data", place / "rows.jsonl", *out], base)
    check(["craft", "--model", base, *out], base)
    check(["evaluate", place / "run", f"model.base={base}"], base)
    check(["convert", base, *out], base)


BROKEN_RUNS = {
    "adapter config is no JSON": lambda run: (run / "adapter" / "adapter_config.json").write_text("{"),
    "adapter config is a list": lambda run: (run / "adapter" / "adapter_config.json").write_text("[]"),
    "adapter of another type": lambda run: put(run / "adapter" / "adapter_config.json", peft_type="LORA", plan=None),
    "plan is a number": lambda run: put(run / "adapter" / "adapter_config.json", plan=3),
    "rules are none": lambda run: put(run / "adapter" / "adapter_config.json", rules={"x": 1}),
    "no adapter config": lambda run: (run / "adapter" / "adapter_config.json").unlink(),
    "adapter weights are cut": lambda run: cut(run / "adapter" / "adapter_model.safetensors"),
    "adapter weights are a folder": lambda run: turn_into_folder(run / "adapter" / "adapter_model.safetensors"),
    "settings are no YAML": lambda run: (run / "run.yaml").write_text("{"),
    "settings are not text": lambda run: (run / "run.yaml").write_bytes(b"\xff\xfe"),
    "a section is a number": lambda run: (run / "run.yaml").write_text("model: 3"),
    "an unknown section": lambda run: (run / "run.yaml").write_text("modle: {base: x}"),
}


@pytest.mark.parametrize("mistake", BROKEN_RUNS)
def test_a_broken_run(mistake, place, tmp_path):
    run = shutil.copytree(place / "run", tmp_path / "broken")
    BROKEN_RUNS[mistake](run)
    out = ["--out", tmp_path / "out", "--approximate"]
    for words in (["evaluate", run], ["export", run, "--to", "peft-lora", *out]):
        check(words)
    check(["export", run, "--to", "peft-lora", *out, "--dry-run"])
    check(["train", "--resume", run], run)


@pytest.mark.parametrize("name", ["nowhere", "rows.jsonl", "base"])
def test_a_run_that_is_none(name, place, tmp_path):
    run, out = place / name, ["--out", tmp_path / "out"]
    for words in (
        ["evaluate", run],
        ["inspect", run],
        ["generate", run, "--prompt", "x"],
        ["export", run, "--to", "peft-lora", *out],
    ):
        check(words, run)
    check(["train", "--resume", run], run)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: [1", "not readable as YAML"),
        ("- 1", "got list"),
        ("model: {base: 3}\ndata: {source: [1]}\ntrain: {steps: many}", "train.steps: got 'many'"),
        ("model: {base: {a: 1}}\ndata: 3\ntrain: 4", "data: got 3"),
        ("model: 2024-01-01\ndata: x", "is not JSON serializable"),
        ("model: !!python/object:os.system {}", "could not determine a constructor"),
        ("1: {2: 3}\nmodel: {base: x}\ndata: {source: y}", "1: unknown key"),
        ("model: x\ndata: y\nadapter: z", "model: got 'x'"),
    ],
)
def test_a_run_file(text, named, tmp_path):
    (tmp_path / "run.yaml").write_text(text)
    check(["train", tmp_path / "run.yaml"], named)
    for words in (["plan"], ["craft", "--out", tmp_path / "out"]):
        check([*words, tmp_path / "run.yaml"])


@pytest.mark.parametrize(
    "setting",
    [
        "train.steps=abc",
        "train=3",
        "model.dtype=int3",
        "adapter.recipe=3",
        "adapter.rank=big",
        "adapter.rules=3",
        "adapter.rules.attention.targets=[nothing]",
        "adapter.rules.attention.kernel=fast",
        "data.max_length=0",
        "data.form=abc",
        "train.learning_rate=.nan",
        "train.seed=99999999999999999999999",
        "train.save_every=0",
        "train.arguments.bf16=maybe",
        "train.arguments={eval_strategy: steps}",
        "train.arguments={learning_rate: 1e-4}",
        "train.arguments={max_steps: x}",
        "a.b.c=1",
        "=3",
        "train.steps=[",
        "title=3",
    ],
)
def test_a_setting(setting, place, tmp_path):
    words = ["train", "--model", place / "base", "--data", place / "rows.jsonl", *SMALL, *SHORT, setting]
    check([*words, "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.jsonl", None),
        ("empty.jsonl", b""),
        ("binary.jsonl", b"\xff\x00\x01\n"),
        ("lists.jsonl", b"[1]\n"),
        ("half.json", b"{"),
        ("no.parquet", b"x"),
        ("half.csv", b'a,b\n"1'),
        ("rows.txt", b"x"),
    ],
)
def test_rows(name, content, place, tmp_path):
    rows = tmp_path / name
    if content is not None:
        rows.write_bytes(content)
    train = ["train", "--model", place / "base", *SMALL, "--data", rows, "--out", tmp_path / "out"]
    for words in (train, [*train, "--dry-run"], ["inspect", place / "run", "--data", rows]):
        check(words, name)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl/below", "/proc/x/y", "n" * 300, "base"])
def test_where_to_write(name, place):
    out = ["--out", place / name]
    train = ["train", "--model", place / "base", "--data", place / "rows.jsonl", *SMALL, *SHORT, *out]
    for words in (
        train,
        ["craft", "--model", place / "base", *out],
        ["export", place / "run", "--to", "peft-lora", "--approximate", *out],
    ):
        check(words, name)
        check([*words, "--overwrite"], name)


@pytest.mark.parametrize(
    "words",
    [
        ["recipes", "x"],
        ["bench", "nothing"],
        ["plan", "--length", 0],
        ["craft", "--seed", -1],
        ["train", "--resume", "x", "--overwrite"],
        ["generate", "run", "--prompt", "x", "--max-new-tokens", 0],
        ["export", "run", "--to", "peft-lora", "--rank", 0, "--approximate", "--out", "x"],
        ["export", "run", "--to", "peft-lora", "--fit-rows", 0, "--approximate", "--out", "x"],
        ["export", "run", "--to", "peft-lora", "--soup", "--approximate", "--out", "x"],
        ["evaluate", "run", "--split", "none"],
        ["inspect", "run", "--residual"],
    ],
)
def test_an_option(words, place, monkeypatch):
    monkeypatch.chdir(place)
    result = call(*words)
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert not (place / "x").exists()


def test_what_the_file_system_refuses():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/a")
    assert find_refusal(full) == "runs/a: No space left on device; valid: a disk with more room, or less to write"
    rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert "No space left on device; valid: a disk with more room" in find_refusal(rust)
    assert "valid: one that you may read and write" in find_refusal(PermissionError(errno.EACCES, "x", "y"))
    assert find_refusal(OSError(errno.ECONNRESET, "reset")) is None and find_refusal(ValueError("x")) is None


def without_coverage():
    """What measures coverage would write more than the limit too, and Python its compiled files."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    return kept | {"PYTHONDONTWRITEBYTECODE": "1"}


def test_a_full_disk_is_one_message(place, tmp_path):
    """As far as it can be had without a disk: files may not exceed 2000 bytes."""
    program = "import mixora_command; mixora_command.main()"
    command = [sys.executable, "-c", program, "craft", "--model", place / "base", "--out", tmp_path / "out"]
    limits = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000)), "timeout": 120}
    done = subprocess.run(command, env=without_coverage(), capture_output=True, text=True, **limits)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "File too large; valid: a file system that takes larger files" in " ".join(done.stderr.split())
