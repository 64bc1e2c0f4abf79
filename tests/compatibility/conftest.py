"""One tiny base and adapters of several recipes on disk, and what each computes where it is alone."""

import pytest
from peft import PeftModel

from tests.compatibility.adapters import ADAPTERS, logits
from tests.models import adapt, tiny_llama


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder for the base, and one for each adapter."""
    found = tmp_path_factory.mktemp("adapters")
    for number, (name, config) in enumerate(ADAPTERS.items()):
        base = tiny_llama()
        base.save_pretrained(found / "base")
        base.name_or_path = base.config._name_or_path = str(found / "base")
        adapt(base, config, seed=number).save_pretrained(found / name)
    return found


@pytest.fixture(scope="session")
def alone(folder):
    """The logits of each adapter where it is the only one, and those of the base as `None`."""
    found = {name: logits(PeftModel.from_pretrained(tiny_llama(), folder / name)) for name in ADAPTERS}
    return {**found, None: logits(tiny_llama())}
