"""Parts from outside of mixora: one file, no change to mixora; and nothing loads that nobody allowed."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from typer.testing import CliRunner

import mixora
from mixora.cli import app
from mixora.errors import CheckpointError, ConfigError
from mixora.planning import outside
from mixora.routers import ROUTERS
from tests.models import tiny_llama

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "parts.md"
MORE = """

class Renamed(InTurn):
    pass


nothing = 3
open({witness!r}, "a").close()
"""


def read_guide(language):
    return re.search(rf"```{language}.*?\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)[1]


@pytest.fixture
def module(tmp_path, monkeypatch, request):
    """The name of a module with a router, and the file that it leaves when it is loaded."""
    name = f"toy_{abs(hash(request.node.name)) % 10**8}"
    witness = tmp_path / "loaded"
    code = read_guide("python").replace("in_turn:", f"{name}:") + MORE.format(witness=str(witness))
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(outside, "_allowed", set())
    yield name, witness
    sys.modules.pop(name, None)
    ROUTERS.pop(f"{name}:InTurn", None)


def configure(kind, **router):
    rule = {"targets": ["attention"], "expert": {"kind": "lora"}, "router": {"kind": kind, **router}}
    return mixora.MixoraConfig(rules={"all": rule})


def test_a_router_in_a_file_of_ones_own_trains_saves_and_loads(module, tmp_path):
    name, _ = module
    mixora.allow_parts(name)
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), configure(f"{name}:InTurn", num_experts=3))
    assert {site.router for site in mixora.plan(tiny_llama(), configure(f"{name}:InTurn")).sites} == {f"{name}:InTurn"}
    ids = torch.arange(12).reshape(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    for key, parameter in model.named_parameters():
        if "mixora_B" in key:
            # each of three experts had four tokens
            blocks = parameter.grad.unflatten(0, (3, -1)) if parameter.grad.shape[0] % 3 == 0 else parameter.grad
            assert blocks.abs().sum() > 0
            parameter.data.normal_()
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    torch.manual_seed(0)
    again = mixora.from_pretrained(tiny_llama(), tmp_path / "adapter")
    torch.testing.assert_close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, rtol=0, atol=0)


def test_nothing_loads_that_nobody_allowed(module):
    name, witness = module
    with pytest.raises(
        ConfigError, match=rf"rules.all.router: got kind '{name}:InTurn', which is code outside of .*valid"
    ):
        configure(f"{name}:InTurn")
    assert not witness.exists()


def test_an_adapter_cannot_bring_its_code_along(module, tmp_path):
    name, witness = module
    mixora.allow_parts(name)
    model = get_peft_model(tiny_llama(), configure(f"{name}:InTurn"))
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    outside._allowed.clear()
    sys.modules.pop(name)
    ROUTERS.pop(f"{name}:InTurn")
    witness.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: rules\.all\.router: .*MIXORA_ALLOW_PARTS="):
        mixora.from_pretrained(tiny_llama(), tmp_path / "adapter")
    assert not witness.exists()


@pytest.mark.parametrize("allowed, is_fine", [("{}", True), ("other, {}", True), ("{}.deeper", False), ("", False)])
def test_the_environment_allows_whole_names(module, monkeypatch, allowed, is_fine):
    name, witness = module
    monkeypatch.setenv(outside.ALLOWED, allowed.format(name))
    if is_fine:
        assert configure(f"{name}:InTurn").method.rules["all"].router.num_experts == 4
    else:
        with pytest.raises(ConfigError, match="outside of mixora"):
            configure(f"{name}:InTurn")
    assert witness.exists() == is_fine


@pytest.mark.parametrize(
    "kind, says",
    [
        ("{}:Nothing", "has no attribute 'Nothing'"),
        ("{}:nothing", "which is no Router"),
        ("{}:Config", "which is no Router"),
        ("{}:Renamed", "its Config.kind is"),
        ("{}.below:InTurn", "No module named"),
    ],
)
def test_what_is_no_router_is_named(module, kind, says):
    name, _ = module
    mixora.allow_parts(name)
    with pytest.raises(ConfigError, match=says):
        configure(kind.format(name))


def test_mistakes_in_its_settings_are_named(module):
    name, _ = module
    mixora.allow_parts(name)
    with pytest.raises(ConfigError, match=r"rules\.all\.router: num_experts: got 0; valid: greater than or equal to 1"):
        configure(f"{name}:InTurn", num_experts=0)
    with pytest.raises(ConfigError, match="num_expert: unknown key; did you mean 'num_experts'"):
        configure(f"{name}:InTurn", num_expert=2)


def test_only_names_of_modules_can_be_allowed():
    for wrong in ("a:b", "", "a..b", "../a", "1a"):
        with pytest.raises(ConfigError, match="valid: the name of a module"):
            mixora.allow_parts(wrong)


def test_the_command_of_the_guide(module, monkeypatch, tmp_path):
    name, _ = module
    variables, words = [], shlex.split(read_guide("sh").replace("\\\n", "").replace("in_turn", name))
    while "=" in words[0]:
        variables.append(words.pop(0))
    for variable in variables:
        monkeypatch.setenv(*variable.split("=", 1))
    assert words.pop(0) == "mixora"
    tiny_llama(use_cache=True).save_pretrained(tmp_path / "base")
    words = [str(tmp_path / "base") if word == "smollm2-135m-instruct" else word for word in words]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert f"router: {name}:InTurn" in result.output
