"""The order of imports (each package only from the left, siblings never from each other), and the size of files."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("src", "tests", "benchmarks", "examples", "release")
SOURCE = ROOT / "src" / "mixora"
MOST_LINES, MOST_LINES_OF_FUNCTION = 300, 40
# with the reason
LARGE = {"tests/merging/test_card.py:test_the_whole_card": "a card, word for word"}
ORDER = [
    {"errors", "short_names", "display", "host"},
    {"files"},
    {"config", "routing"},
    {"contracts", "passes", "depth"},
    {"experts", "routers", "kernels", "losses", "allocators"},
    {"mixture"},
    {"planning"},
    {"recipes", "footprint"},
    {"tuner"},
    {"diagnostics", "bases", "environment"},
    {"cards"},
    {"data", "evaluate", "loading", "conversion"},
    {"merging", "standalone"},
    {"training"},
    {"comparison", "exporting", "answering"},
    {"endpoint", "integrations"},
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


def packages():
    return sorted(path.parent for path in SOURCE.rglob("__init__.py") if path.parent != SOURCE)


def imported_siblings(path):
    """Files of the same package that `path` imports, at its top or in a function; the package itself as `__init__`."""
    package = ".".join(("mixora", *path.parent.relative_to(SOURCE).parts))
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == package:
            names = {alias.name for alias in node.names}
            yield from ("__init__" if not (path.parent / f"{name}.py").exists() else name for name in names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(package + "."):
            yield node.module.removeprefix(package + ".")


@pytest.mark.parametrize("folder", packages(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_two_files_of_a_package_lead_to_each_other(folder):
    graph = {path.stem: set(imported_siblings(path)) for path in folder.glob("*.py")}
    TopologicalSorter(graph).prepare()


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
