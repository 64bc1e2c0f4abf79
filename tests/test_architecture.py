"""The order of imports: each module only from the left, siblings never from each other."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "mixora"
ORDER = [
    {"errors", "short_names", "stages", "console", "world", "documents"},
    {"draws", "completion", "asides", "devices", "base_limits", "inputs"},
    {"routing", "config", "folders", "low_rank", "fused_loss", "activations", "host", "sharding"},
    {"contracts", "passes", "depth", "outside", "gguf_files"},
    {"experts", "routers", "kernels", "losses", "allocators", "slots", "parts", "plan", "entrances"},
    {"method", "sites", "joining", "folding", "injection"},
    {"decoding"},
    {"recipes", "mixture", "assignment", "feed_forward"},
    {"assembly", "keys"},
    {"allocation", "admission"},
    {"tuner", "footprint", "serving"},
    {"diagnostics", "bases", "environment"},
    {"cards"},
    {"data", "evaluate", "loading", "crafting", "conversion"},
    {"merging", "standalone"},
    {"training"},
    {"comparison", "exporting", "answering"},
    {"endpoint", "integrations"},
    {"terminal"},
    {"commands"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


def family(path):
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imported_families(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mixora":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[1] for a in node.names if a.name.startswith("mixora.")]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_come_only_from_the_left(path):
    here = family(path)
    assert here in LEVEL, f"{here} has no place in the order of imports"
    wrong = [other for other in imported_families(path) if other != here and LEVEL[other] >= LEVEL[here]]
    assert not wrong, f"{here} imports {wrong}"
