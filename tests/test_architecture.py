"""The order of imports (each module only from the left, siblings never from each other), and the size of files."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "release")
SOURCE = ROOT / "src" / "mixora"
MOST_LINES, MOST_LINES_OF_FUNCTION = 300, 40
# with the reason
LARGE = {"tests/merging/test_card.py:test_the_whole_card": "a card, word for word"}
ORDER = [
    {"errors", "short_names", "stages", "console", "world", "documents"},
    {"draws", "completion", "asides", "devices", "base_limits", "inputs", "packed"},
    {"routing", "config", "folders", "low_rank", "fused_loss", "activations", "host", "sharding"},
    {"contracts", "passes", "depth", "outside", "gguf_files", "whole_modules"},
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


def test_files_and_functions_are_small():
    """Lines of a function: from `def` to its end, without its docstring."""
    large = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
        if len(text.splitlines()) > MOST_LINES:
            large[name] = len(text.splitlines())
        functions = (
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        )
        sizes = {f"{name}:{function.name}": count_lines(function) for function in functions}
        large |= {function: size for function, size in sizes.items() if size > MOST_LINES_OF_FUNCTION}
    assert large.keys() == LARGE.keys(), large


def count_lines(function):
    whole, first = function.end_lineno - function.lineno + 1, function.body[0]
    return whole if ast.get_docstring(function) is None else whole - (first.end_lineno - first.lineno + 1)
