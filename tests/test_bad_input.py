"""Bad input: what fuzzing found once, the bounds that are stated, and a few inputs of each target of fuzzing."""

import copy
import json
import os
import subprocess
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import mixora
from benchmarks.reliability import fuzz
from benchmarks.reliability.targets import TARGETS
from benchmarks.reliability.targets.material import CHAT, adapter_files, make_base, make_tokenizer, write_files
from benchmarks.reliability.targets.settings import BOMB
from mixora.bases import read_base_config
from mixora.bases.limits import check_sizes
from mixora.cli import app
from mixora.config import parse, read_yaml
from mixora.data import read_rows, templates
from mixora.errors import CheckpointError, ConfigError, DataError, MixoraError, ModelError
from mixora.files import documents
from mixora.files.documents import UnreadableError, parse_json, parse_yaml
from mixora.training.run_config import RunConfig
from tests.models import tiny_llama

# others take more than 10 ms for an input, or ask the hub; the program gives them theirs
QUICK_TARGETS = [name for name in TARGETS if name not in ("template", "gguf", "command", "record", "text", "names")]


@pytest.mark.parametrize("name", QUICK_TARGETS)
@settings(max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.binary(min_size=4, max_size=80))
def test_a_target(name, data):
    try:
        TARGETS[name].run(data)
    except MixoraError as error:
        assert str(error)


@pytest.mark.parametrize("engine", ["atheris", "mutation"])
def test_the_program(engine, tmp_path):
    given = ["jsonl", "words", "--inputs", "60", "--engine", engine, "--out", str(tmp_path)]
    if engine == "atheris":
        pytest.importorskip("atheris", reason="atheris is not installed; make fuzz installs it")
        # mixora is instrumented when it is imported, so this takes a process of its own
        subprocess.run([sys.executable, "-m", "benchmarks.reliability.fuzz", *given], check=True)
    else:
        fuzz.main(given)
    found = json.loads(next(tmp_path.glob("*.json")).read_text())
    assert found["engine"] == engine and found["findings"] == 0
    assert {name: tally["inputs"] for name, tally in found["targets"].items()} == {"jsonl": 60, "words": 60}
    assert all(sum(tally["outcomes"].values()) == 60 for tally in found["targets"].values())


def test_the_program_reports_what_it_finds(monkeypatch, tmp_path):
    def fail(data):
        if data:
            raise KeyError("x")

    monkeypatch.setitem(TARGETS, "bad", TARGETS["words"]._replace(run=fail))
    found = fuzz.main(["bad", "--inputs", "30", "--engine", "mutation", "--out", str(tmp_path)])
    assert [finding["kind"] for finding in found["targets"]["bad"]["findings"]] == ["finding: KeyError"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "more than 100,000 values, aliases unfolded"),
        ("a: &a [*a]", "stands inside of what it names"),
        ("a: {" * 200, "nested too deeply; valid: at most 100 levels"),
        ("a: 1\nb: 2\na: 3", "line 3: has the key 'a' twice"),
        ("a: 2024-13-99", "holds a value that is none: month must be in"),
        ("a: " + "9" * 5000, "more than 100 digits"),
        ("a: " + "1:" * 300 + "1", "more than 100 digits"),
        ("a: !!float ''", "holds a value that is none"),
        ("a: !!bool x", "holds a value that is none"),
        ("a: !!python/object:os.system {}", "could not determine a constructor"),
        ("[1]: 2", "unhashable"),
    ],
)
def test_yaml_that_is_refused(text, message):
    with pytest.raises(UnreadableError, match=message):
        parse_yaml(text)


def test_yaml_that_is_kept():
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {"a": {"b": 1}, "c": {"b": 1}, "d": {"b": 1, "e": 2}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', "has the key 'a' twice"),
        ('{"a": NaN}', "is not JSON: NaN is no number there"),
        ('"\\ud800"', r"holds \\ud800, half of a surrogate pair"),
        ("[" * 101 + "]" * 101, "nested too deeply; valid: at most 100 levels"),
        ("[" * 100_000, "nested too deeply"),
        ("9" * 5000, "a number of more than 4300 digits"),
        ("{]", "is not JSON: Expecting property name .* at column 2"),
    ],
)
def test_json_that_is_refused(text, message):
    with pytest.raises(UnreadableError, match=message):
        parse_json(text)


def test_json_that_is_kept():
    assert parse_json('{"a": "\\ud83d\\ude00", "b": "\\\\ud800"}') == {"a": "😀", "b": "\\ud800"}
    assert parse_json("[" * 100 + "]" * 100)


def test_a_file_is_not_read_beyond_its_bound(monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "MOST_JSON_BYTES", 10)
    (tmp_path / "a.json").write_text('{"a": "0123456789"}')
    with pytest.raises(UnreadableError, match="more than 10 bytes"):
        documents.read_json(tmp_path / "a.json")
    (tmp_path / "run.yaml").write_text("a: 1\n" * 400_000)
    with pytest.raises(ConfigError, match="more than 1,048,576 bytes"):
        read_yaml(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 10**9}, "num_experts: got 1000000000; valid: less than or equal to 65536"),
        ({"rank": 10**12}, "rank: got 1000000000000; valid: less than or equal to 65536"),
        ({"rank": 10**400}, "rank: got 10+… .401 characters.; valid"),
        ({"budget": 10**18}, "budget: got 1000000000000000000; valid: less than or equal to 1000000000000000"),
        ({"targets": "a" * 2000}, "at most 1000 characters"),
    ],
)
def test_sizes_beyond_the_bounds_of_a_method(settings, message):
    with pytest.raises(ConfigError, match=message):
        mixora.recipe("sira", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_experts": 5000, "top_k": 1}, "num_experts: got 5000; valid: 1 to 4096"),
        ({"budget": 10**14}, "gives model.layers.0.self_attn.q_proj experts of rank .*; valid: at most 65536"),
        ({"targets": r"(.*a|.*_|.*o)*(.*a|.*_|.*o)*(.*a|.*_|.*o)*!"}, "takes more than 1 s for one path|matches no"),
        ({"targets": "(" * 900}, "no regular expression"),
        ({"targets": "(" * 400 + "q" + ")" * 400}, "no regular expression"),
    ],
)
def test_methods_that_a_plan_refuses(settings, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(tiny_llama(), mixora.recipe("sira", **settings))


def test_an_adapter_larger_than_the_machine_is_refused_before_it_is_made():
    config = mixora.recipe("sira", num_experts=4096, rank=65536, targets=["q_proj", "v_proj", "o_proj", "k_proj"])
    with pytest.raises(ConfigError, match=r"the adapter takes .* GiB, and this machine has"):
        peft.get_peft_model(tiny_llama(layers=8), config)


@pytest.mark.parametrize("names", [3.5, "lm_head", [1]])
def test_modules_to_save_that_are_none(names):
    with pytest.raises(ConfigError, match=r"modules_to_save: got .*; valid: a list of names"):
        mixora.recipe("sira", modules_to_save=names)


@pytest.mark.parametrize("tree", [{"model": {"base": "b"}, "data": {"source": "x"}, "train": {"epochs": 1e308}}])
def test_a_run_of_too_many_steps(tree):
    with pytest.raises(ConfigError, match=r"train.epochs: got 1e\+308"):
        parse(RunConfig, tree)
    deep = {}
    for _ in range(100_000):
        deep = {"a": deep}
    with pytest.raises(ConfigError, match="nested too deeply"):
        parse(RunConfig, {**tree, "title": deep})


def test_a_base_with_a_billion_layers(tmp_path):
    config = {"model_type": "llama", "num_hidden_layers": 10**9, "hidden_size": 16, "num_attention_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="num_hidden_layers: got 1000000000; valid: at most 10000"):
        read_base_config(tmp_path)
    check_sizes(make_base().config, "base")


@pytest.mark.parametrize("name", ["x" * 5000, "a\x00b", "\ud800"])
def test_names_that_are_no_paths(name):
    for use, error in ((read_base_config, ModelError), (read_rows, DataError), (mixora.recipe, ConfigError)):
        with pytest.raises(error):
            use(name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,text\na,b\n", "line 1: has the column 'text' twice"),
        ("a.csv", b"text,label\na," + b"9" * 5000, "more than 100 digits"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', "line 1: has the key 'text' twice"),
        ("a.jsonl", b'{"text": "\\udc00"}', r"line 1: holds \\udc00, half of a surrogate pair"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: holds a number of more than 4300 digits"),
    ],
)
def test_rows_that_are_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / name)


def test_all_damaged_tensors_are_named_in_one_error(tmp_path):
    tensors = safetensors.torch.load(adapter_files()["adapter_model.safetensors"])
    names = sorted(tensors)
    del tensors[names[0]]
    tensors[names[1]] = tensors[names[1]][:-1].contiguous()
    tensors[names[2]] = tensors[names[2]].to(torch.int32)
    tensors[names[3]][0, 0] = torch.nan
    tensors["more"] = torch.zeros(1)
    write_files(tmp_path, {**adapter_files(), "adapter_model.safetensors": safetensors.torch.save(tensors)})
    with pytest.raises(CheckpointError) as caught:
        mixora.from_pretrained(copy.deepcopy(make_base()), tmp_path)
    told = str(caught.value)
    assert "5 tensors do not fit" in told
    assert f"{names[0]}: missing" in told and "more: unexpected" in told
    assert f"{names[1]}: got [" in told and f"{names[2]}: got numbers of type I32" in told
    assert f"{names[3]}: 1 of " in told and "not finite" in told


def test_a_header_that_claims_too_much(tmp_path):
    content = adapter_files()["adapter_model.safetensors"]
    write_files(
        tmp_path, {**adapter_files(), "adapter_model.safetensors": (10**12).to_bytes(8, "little") + content[8:]}
    )
    with pytest.raises(CheckpointError, match="is damaged"):
        mixora.from_pretrained(copy.deepcopy(make_base()), tmp_path)


ASKED = [{"role": "user", "content": "hé\u2028"}, {"role": "assistant", "content": "yes"}]


@pytest.mark.parametrize(
    "template",
    [
        CHAT,
        "{{ messages | tojson }}{% if add_generation_prompt %}x{% endif %}",
        "{%- for m in messages %}{% generation %}{{ m.content | trim }}{% endgeneration %}\n{% endfor %}",
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m['content'] }}{% endfor %}",
    ],
)
@pytest.mark.parametrize("asks", [False, True])
def test_templates_are_rendered_as_transformers_does(template, asks):
    tokenizer = make_tokenizer(template)
    expected = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=asks)
    assert templates.render(ASKED, tokenizer, asks) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
        ("{{ 9**(9**9) }}", "more than 1 seconds|more than 1024 MiB"),
        ("{{ 'a' * 10**11 }}", "more than 1024 MiB"),
        (
            "{% set n = namespace(x='aa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
            "1024 MiB|1 seconds",
        ),
        ("{{ range(10**9) }}", "OverflowError: Range too big"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe|is undefined"),
        ("{% if", "unexpected|Unexpected|end of template"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no such role') }}", "refuses the messages: no such role"),
    ],
)
def test_templates_are_bounded(template, message, monkeypatch):
    monkeypatch.setattr(templates, "MOST_SECONDS", 1.0)
    with pytest.raises(DataError, match=message):
        templates.render(ASKED, make_tokenizer(template), False)


@pytest.mark.parametrize("name", ["a\udcffb", "\x1b[31m", "[bold]"])
def test_odd_names_at_the_command_line(name):
    result = CliRunner().invoke(app, ["plan", "--model", name])
    assert result.exit_code == 2 and "fault" not in result.output


@pytest.mark.parametrize("step", [None, 1e308, "x", 10**400])
def test_a_trainers_log_with_a_step_that_is_none(step, tmp_path):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": step, "loss": 1.0}]}))
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2 and "log_history is damaged" in result.output
