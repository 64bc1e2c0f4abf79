"""Names that adapters may have, and those under which their tensors could not be kept or told apart."""

import pytest
from peft import PeftModel, get_peft_model

from mixora.errors import ConfigError
from tests.behaviours.cases import base, config, logits, same, wrap


@pytest.mark.parametrize("name", ["a-b", "with space", "Ünïcode", "default2", "A", "router", "lora", "1st"])
def test_odd_names(name, tmp_path):
    model = wrap("sira", adapter_name=name)
    expected = logits(wrap("sira"))
    assert same(logits(model), expected)
    model.save_pretrained(tmp_path)
    assert same(logits(PeftModel.from_pretrained(base(), tmp_path / name, adapter_name=name)), expected)


@pytest.mark.parametrize("name", ["", "v1.0", "a/b", "..", "a\\b", "keys", "pop", "training", "_keys", "forward"])
@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained in the prefix")
def test_names_that_cannot_be_kept(name):
    with pytest.raises(ConfigError, match=r"adapter_name: got .*; valid: a name without '\.', '/'"):
        get_peft_model(base(), config("sira"), adapter_name=name)
    model = wrap("sira")
    before = logits(model)
    with pytest.raises(ConfigError, match="adapter_name: got"):
        model.add_adapter(name, config("sira"))
    assert list(model.peft_config) == ["default"]
    assert same(logits(model), before)


@pytest.mark.parametrize("name", ["0", "layers", "q_proj", "model", "base_layer", "weight", "mixora_A"])
def test_names_by_which_peft_would_lose_other_adapters(name):
    """It leaves every tensor out of a file that has the name of another adapter anywhere in its path."""
    model = wrap("sira")
    with pytest.raises(ConfigError, match=f"adapter_name: got '{name}', a part of the paths of this model's tensors"):
        model.add_adapter(name, config("sira"))
