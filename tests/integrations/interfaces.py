"""The interfaces of axolotl and ms-swift: theirs where they are installed, and stubs of the same shape."""

import importlib
import re
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "axolotl_and_swift.md"
WHICH = ("stub", "real")


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class PeftTuner:
    @staticmethod
    def save_pretrained(model, save_directory, state_dict=None, safe_serialization=True, **kwargs):
        model.save_pretrained(save_directory, safe_serialization=safe_serialization, selected_adapters=["default"])


def block_of_guide(language):
    """The only block of that language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), flags=re.DOTALL)
    return block


def stubs_of(package):
    """Modules by name, made anew."""
    axolotl = {"axolotl.integrations.base": {"AdapterCapabilities": AdapterCapabilities, "BasePlugin": object}}
    swift = {"swift.tuner_plugin": {"PeftTuner": PeftTuner, "tuners_map": {}}, "swift.callbacks": {"callbacks_map": {}}}
    found = {"axolotl": axolotl, "swift": swift}[package]
    return {name: vars(SimpleNamespace(**members)) for name, members in found.items()}


def import_plugin(monkeypatch, package, module, which):
    """Our module over the interface of `package`; skips where the real one is asked for and not installed."""
    if which == "real" and find_spec(package) is None:
        pytest.skip(f"{package} is not installed; `make test-plugins` runs this")
    if which == "stub":
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            monkeypatch.delitem(sys.modules, name)
        for name, members in stubs_of(package).items():
            monkeypatch.setitem(sys.modules, name, stub := ModuleType(name))
            vars(stub).update(members)
    monkeypatch.delitem(sys.modules, f"mixora.integrations.{module}", raising=False)
    with warnings.catch_warnings():
        # what those packages warn of when they are imported is not ours
        warnings.simplefilter("ignore")
        return importlib.import_module(f"mixora.integrations.{module}")
