"""What strangers hand over (bases, adapters, indices, names) neither runs, nor leaves its folder, nor steers."""

import ast
import io
import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from peft import get_peft_model
from rich.table import Table
from safetensors.torch import load_file, save_file

import mixora
from mixora import loading
from mixora.bases import load_base, read_base_config, sketch_base
from mixora.cards import Facts
from mixora.conversion import convert
from mixora.display.console import Console, show_controls
from mixora.errors import CheckpointError, ConfigError, ModelError
from mixora.merging.card import write_companions
from mixora.merging.result import Merged, MergedSite
from tests.models import tiny_llama

STEERS = "\x1b[2J\x1b]8;;http://example.org\x07[red]x[/red][/] :skull: \x9b31m \x7f"


class Payload:
    """Leaves a file behind where it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.fixture
def base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("model_type", ["novel", "llama"])
def test_code_that_comes_with_a_base_does_not_run(base, model_type, monkeypatch):
    witness = base / "ran"
    (base / "novel.py").write_text(f"open({str(witness)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    config = json.loads((base / "config.json").read_text())
    code = {"AutoConfig": "novel.C", "AutoModelForCausalLM": "novel.M", "AutoTokenizer": ["novel.C", None]}
    (base / "config.json").write_text(json.dumps({**config, "model_type": model_type, "auto_map": code}))
    (base / "tokenizer_config.json").write_text(json.dumps({"auto_map": code}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asks"))
    for read in (load_base, sketch_base, read_base_config):
        if model_type == "novel":
            with pytest.raises(ModelError, match="brings code of its own, which runs with trust_remote_code=True only"):
                read(base)
    if model_type == "llama":
        with pytest.raises(ModelError):
            load_base(base)
    assert not witness.exists()


def test_a_base_in_a_pickle_is_refused(base):
    (base / "model.safetensors").unlink()
    torch.save({"x": Payload(base / "ran")}, base / "pytorch_model.bin")
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError):
        load_base(base)
    assert not (base / "ran").exists()


def test_an_adapter_in_a_pickle_is_refused(tmp_path):
    model = get_peft_model(tiny_llama(), mixora.recipe("sira", task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "ran")}, tmp_path / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        mixora.from_pretrained(tiny_llama(), tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["norm.weight", "layers.0.self_attn.q_proj.base_layer.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("is_first", [True, False])
def test_an_adapter_writes_nothing_into_the_base(name, is_first, tmp_path):
    get_peft_model(tiny_llama(), mixora.recipe("sira", task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    base = tiny_llama()
    model = base if is_first else get_peft_model(base, mixora.recipe("pesc", task_type="CAUSAL_LM"))
    load = mixora.from_pretrained if is_first else partial(loading.add_pretrained, adapter_name="other")
    path = tmp_path / "adapter_model.safetensors"
    weight = base.get_parameter("model." + name.replace(".base_layer", ""))
    save_file({**load_file(path), f"base_model.model.model.{name}": torch.full_like(weight, 7.0)}, path)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    # PEFT saves embeddings by itself, and the first adapter may bring them
    if is_first and name == "embed_tokens.weight":
        assert (load(model, tmp_path).get_input_embeddings().weight == 7).all()
        return
    with pytest.raises(CheckpointError, match=rf"{name}: unexpected, since it is a weight of the base"):
        load(model, tmp_path)
    now = base.state_dict()
    assert now.keys() == before.keys() and all(torch.equal(now[name], tensor) for name, tensor in before.items())


def test_of_an_adapter_on_the_hub_two_files_are_fetched(tmp_path, monkeypatch):
    model = get_peft_model(tiny_llama(), mixora.recipe("sira", task_type="CAUSAL_LM"))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    asked = {}

    def download(name, allow_patterns):
        asked[name] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr(loading, "snapshot_download", download)
    mixora.from_pretrained(tiny_llama(), "someone/mixture")
    assert asked == {"someone/mixture": ["adapter_config.json", "adapter_model.safetensors"]}


def test_a_hub_that_has_nothing_is_one_sentence(monkeypatch):
    def fail(name, allow_patterns):
        raise OSError("offline")

    monkeypatch.setattr(loading, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="someone/mixture: no such folder, and the hub answered: offline"):
        mixora.from_pretrained(tiny_llama(), "someone/mixture")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/hostname", "sub/part.safetensors", "", 3, ".."])
def test_an_index_stays_in_its_folder(tmp_path, shard):
    config = {"model_type": "camelidae", "num_experts": 2, "topk": 1, "adapter_dim": 4, "moe_scaling": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match=r"names of files in the same folder|files that are not there"):
        convert(tmp_path, tmp_path / "out")


def test_an_expression_that_never_ends_is_stopped():
    rule = {"targets": r"((\w|.)+)+\1[^a-z]", "expert": {"kind": "lora"}, "router": {"kind": "single"}}
    with pytest.raises(ConfigError, match=r"rules\.all\.targets: the expression .* takes more than 1 s"):
        mixora.plan(tiny_llama(), mixora.MixoraConfig(rules={"all": rule}))


def test_names_in_a_model_card_stay_text(tmp_path):
    name = 'x"\n---\nlicense: mit\n---\n`) or __import__("os")'
    site = MergedSite("layers.0.`x`|y", "exact", 4, 0.0)
    for form in ("peft-lora", "averaged", "dense"):
        write_companions(Merged(tmp_path, form, name, name, (site,)), Facts(name, recipe=name, place=name))
        _, header, text = (tmp_path / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        # a name that is none of the hub's is no metadata
        assert set(yaml.safe_load(header)) == {"library_name", "tags"}
        (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
        called = {node.func for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)}
        assert {function.attr for function in called} == {"from_pretrained"}
        assert "license: mit" not in text.splitlines()


def test_text_cannot_steer_a_terminal():
    for width in (20, 200):
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, color_system=None, width=width)
        table = Table(STEERS, title=STEERS, caption=STEERS)
        table.add_row(STEERS)
        console.print(STEERS)
        console.print(table)
        printed = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())
        assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printed)
        assert "[red]x[/red][/]" in printed or width == 20


def test_a_column_is_as_broad_as_the_signs_for_control_characters():
    file = io.StringIO()
    grid = Table.grid()
    grid.add_row("\x1b[31mred")
    Console(file=file, width=80).print(grid)
    assert file.getvalue().strip().endswith("red")


def test_letters_of_all_languages_are_shown():
    text = "ünï 日本 \N{PARTY POPPER}\tกขค\n"
    assert show_controls(text) == text
    assert show_controls("a\x00b\x85c") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c"


def test_only_one_module_makes_a_console():
    for path in Path(mixora.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if path.name != "console.py":
            assert not re.search(
                r"from rich.console import .*\bConsole\b|from rich import print|Text\.from_markup", text
            ), path
