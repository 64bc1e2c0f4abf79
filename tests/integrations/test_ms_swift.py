"""The tuner of ms-swift, over its interface where it is installed and over a stub of the same shape."""

import sys
from types import SimpleNamespace

import pytest
import torch

import mixora
from mixora.errors import ConfigError
from tests.integrations.adapters import SETTINGS, assert_auxiliary_gradient, logits, make_base
from tests.integrations.interfaces import WHICH, block_of_guide, import_plugin

ARGS = SimpleNamespace(callbacks=["mixora"])


@pytest.fixture(params=WHICH)
def module(request, monkeypatch):
    found = import_plugin(monkeypatch, "swift", "ms_swift", request.param)
    for table in (found.tuners_map, found.callbacks_map):
        monkeypatch.delitem(table, "mixora", raising=False)
    found.register("sira", **SETTINGS)
    return found


def test_the_registered_tuner_makes_the_adapter(module):
    model = module.tuners_map["mixora"].prepare_model(ARGS, make_base())
    config = model.peft_config["default"]
    assert issubclass(module.tuners_map["mixora"], module.PeftTuner)
    assert model.peft_type == "MIXORA" and config.task_type == "CAUSAL_LM"
    assert config.plan == mixora.plan(make_base(), mixora.recipe("sira", **SETTINGS)).to_list()


def test_what_is_saved_is_loaded(module, tmp_path):
    tuner = module.tuners_map["mixora"]
    first = tuner.prepare_model(ARGS, make_base())
    with torch.no_grad():
        for name, p in first.named_parameters():
            if "mixora_B" in name:
                p.normal_()
    tuner.save_pretrained(first, str(tmp_path), state_dict=None, safe_serialization=True)
    second = tuner.from_pretrained(make_base(), str(tmp_path), is_trainable=True)
    assert torch.equal(logits(first), logits(second))
    assert any(p.requires_grad for p in second.parameters())
    assert torch.equal(logits(mixora.from_pretrained(make_base(), tmp_path)), logits(first))


def test_the_callback_brings_the_auxiliary_gradient(module, tmp_path):
    model = module.tuners_map["mixora"].prepare_model(ARGS, make_base())
    assert_auxiliary_gradient(model, [module.callbacks_map["mixora"](None, None)], tmp_path)


def test_mistakes_are_named(module):
    tuner = module.tuners_map["mixora"]
    with pytest.raises(ConfigError, match=r"callbacks: got \[\]; valid: --callbacks mixora"):
        tuner.prepare_model(SimpleNamespace(callbacks=[]), make_base())
    with pytest.raises(ConfigError, match="one is loaded before second"):
        tuner.from_pretrained(tuner.prepare_model(ARGS, make_base()), "second")
    with pytest.raises(ConfigError, match="top_q"):
        module.register("sira", top_q=1)


def test_ms_swift_itself_reads_the_plugin_file_and_makes_the_adapter(monkeypatch, tmp_path):
    """Its import of `--external_plugins` and its own function that prepares a model, with the file of the guide."""
    import_plugin(monkeypatch, "swift", "ms_swift", "real")
    from swift.tuner_plugin import tuners_map
    from swift.utils.utils import import_external_file

    file = tmp_path / "sira_tuner.py"
    file.write_text(block_of_guide("python"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    import_external_file(str(file))
    from swift.pipelines.train.tuner import TunerMixin

    no_tools = {"use_liger_kernel": False, "use_galore": False, "resume_from_checkpoint": None, "adapters": []}
    args = SimpleNamespace(is_adapter=True, tuner_backend="peft", tuner_type="mixora", callbacks=["mixora"], **no_tools)
    model = TunerMixin.prepare_model(args, make_base())
    assert {site["num_experts"] for site in model.peft_config["default"].plan} == {8}
    assert "mixora" in tuners_map
