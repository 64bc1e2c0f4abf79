"""The plug-in of axolotl, over its interface where it is installed and over a stub of the same shape."""

from types import SimpleNamespace

import pytest
import torch
import yaml

import mixora
from mixora.errors import ConfigError
from tests.integrations.adapters import SETTINGS, assert_auxiliary_gradient, logits, make_base
from tests.integrations.interfaces import WHICH, block_of_guide, import_plugin

SECTION = {"recipe": "sira", **SETTINGS}
PLUGIN = "mixora.integrations.axolotl.MixoraPlugin"


@pytest.fixture(params=WHICH)
def module(request, monkeypatch):
    return import_plugin(monkeypatch, "axolotl", "axolotl", request.param)


def cfg_of(section=SECTION, **changes):
    given = {"adapter": "mixora", "lora_model_dir": None, "lora_dropout": 0.0, "mixora": section}
    return SimpleNamespace(**{**given, **changes})


def test_the_section_becomes_the_adapter(module):
    model, config = module.MixoraPlugin().load_adapter(make_base(), cfg_of())
    expected = mixora.recipe("sira", task_type="CAUSAL_LM", **SETTINGS)
    assert (config.recipe, config.rules, config.losses) == ("sira", expected.rules, expected.losses)
    assert model.peft_type == "MIXORA" and config.task_type == "CAUSAL_LM"
    assert config.plan == mixora.plan(make_base(), expected).to_list()


def test_trainers_that_make_the_adapter_themselves_get_its_configuration(module):
    section = {**SECTION, "task_type": "SEQ_CLS"}
    model, config = module.MixoraPlugin().load_adapter(make_base(), cfg_of(section), config_only=True)
    assert model is None and config.recipe == "sira" and config.task_type == "SEQ_CLS"


@pytest.mark.parametrize("inference", [False, True])
def test_a_saved_adapter_is_loaded(module, tmp_path, inference):
    plugin = module.MixoraPlugin()
    first, _ = plugin.load_adapter(make_base(), cfg_of())
    with torch.no_grad():
        for name, p in first.named_parameters():
            if "mixora_B" in name:
                p.normal_()
    first.save_pretrained(tmp_path)
    second, config = plugin.load_adapter(make_base(), cfg_of({}, lora_model_dir=str(tmp_path)), inference=inference)
    assert torch.equal(logits(first), logits(second)) and config.recipe == "sira"
    assert any(p.requires_grad for p in second.parameters()) is not inference


def test_the_callback_brings_the_auxiliary_gradient(module, tmp_path):
    plugin, cfg = module.MixoraPlugin(), cfg_of()
    model, _ = plugin.load_adapter(make_base(), cfg)
    assert_auxiliary_gradient(model, plugin.add_callbacks_pre_trainer(cfg, model), tmp_path)


def test_other_adapters_are_left_alone(module):
    plugin, cfg = module.MixoraPlugin(), cfg_of(None, adapter="lora", lora_r=8)
    assert plugin.load_adapter(make_base(), cfg) is None
    assert plugin.add_callbacks_pre_trainer(cfg, None) == []


@pytest.mark.parametrize(
    ("cfg", "words"),
    [
        (cfg_of(None), r"mixora\.recipe: is missing; valid: a section"),
        (cfg_of({"recipe": "sirra"}), "sirra.*sira"),
        (cfg_of({**SECTION, "top_q": 1}), "top_q"),
        (cfg_of(lora_r=8, lora_alpha=16), "lora_r, lora_alpha: no effect with adapter: mixora"),
    ],
)
def test_mistakes_are_named(module, cfg, words):
    with pytest.raises(ConfigError, match=words):
        module.MixoraPlugin().load_adapter(make_base(), cfg)


def test_axolotl_itself_registers_checks_and_loads(monkeypatch):
    """Its plug-in manager, its schema and its own function that loads adapters, from the guide's YAML."""
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    import_plugin(monkeypatch, "axolotl", "axolotl", "real")
    from axolotl.integrations.base import PluginManager
    from axolotl.integrations.config import merge_input_args
    from axolotl.loaders.adapter import load_adapter
    from axolotl.utils.dict import DictDefault

    manager = PluginManager.get_instance()
    manager.register(PLUGIN)
    _, schema = merge_input_args()
    given = yaml.safe_load(block_of_guide("yaml"))
    cfg = DictDefault(schema(**given).model_dump(exclude_none=True))
    model, config = load_adapter(make_base(), cfg, cfg.adapter)
    settings = {name: value for name, value in given["mixora"].items() if name != "recipe"}
    assert config.plan == mixora.plan(make_base(), mixora.recipe("sira", **settings)).to_list()
    assert [type(c) for c in manager.add_callbacks_pre_trainer(cfg, model)] == [mixora.AuxiliaryLossCallback]
