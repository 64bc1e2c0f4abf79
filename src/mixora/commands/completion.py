"""What the shell offers after TAB. Imports no library and none of the modules that it tells of: TAB must be quick."""

import ast
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

from mixora.short_names import SHORT_NAMES

PACKAGE = Path(__file__).parents[1]
RUN_FILE = "run.yaml"
DESTINATIONS = ("peft-lora", "dense", "standalone", "averaged", "adapter", "hub")
DEPTH, MOST_FOLDERS = 3, 2000
# the classes that hold a section's settings, by their place in the source
_RUN = "training/run_config.py"
SECTIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "model": ((_RUN, "ModelSection"),),
    "adapter": ((_RUN, "AdapterSection"),),
    "data": ((_RUN, "DataSection"), ("data/prompts.py", "EncodingConfig")),
    "train": ((_RUN, "TrainSection"),),
    "evaluate": ((_RUN, "EvaluateSection"), ("evaluate/evaluation.py", "EvaluationConfig")),
}


def complete_recipe(incomplete: str) -> list[str]:
    """Names of recipes."""
    return [name for name in recipes() if name.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Short names of base models; folders are the shell's own."""
    return [name for name in SHORT_NAMES if name.startswith(incomplete)]


def complete_destination(incomplete: str) -> list[str]:
    """What an export can be made for; see `mixora.exporting`."""
    return [name for name in DESTINATIONS if name.startswith(incomplete)]


def complete_run(incomplete: str) -> list[str]:
    """Folders that `mixora train` wrote, up to three folders below what is typed."""
    found = _find_runs(os.path.dirname(incomplete))
    return sorted(path for path in found if path.startswith(incomplete))


def complete_setting(context: typer.Context, incomplete: str) -> list[str]:
    """Names of settings, `train.steps=` and the like; those of the adapter are what the recipe states."""
    names = list(_fields(_RUN, "RunConfig") - SECTIONS.keys())
    for section, classes in SECTIONS.items():
        names += [f"{section}.{name}" for source in classes for name in _fields(*source)]
    if incomplete.startswith("adapter."):
        chosen = context.params.get("recipe")
        for recipe in [chosen] if chosen in recipes() else recipes():
            names += [f"adapter.{name}" for name in adapter_settings(recipe, incomplete.count(".") > 1)]
    return sorted({f"{name}=" for name in names if name.startswith(incomplete)})


def recipes() -> list[str]:
    """What `mixora.recipe_names` tells."""
    return sorted(path.stem for path in (PACKAGE / "recipes").glob("*.yaml"))


def adapter_settings(recipe: str, dotted: bool) -> set[str]:
    """The settings that a recipe states: names that reach every part of it or, if `dotted`, paths to one."""
    import yaml

    tree = yaml.safe_load((PACKAGE / "recipes" / f"{recipe}.yaml").read_text(encoding="utf-8"))
    paths = set(_paths({part: tree.get(part) or {} for part in ("rules", "losses", "allocator")}))
    return paths if dotted else {path.rpartition(".")[2] for path in paths} - {"kind", "targets"}


def _paths(tree: Mapping[str, Any], at: str = "") -> Iterator[str]:
    for name, value in tree.items():
        # from, to, middle, ...: values that follow a line over depth
        is_group = isinstance(value, Mapping) and "from" not in value
        yield from _paths(value, f"{at}{name}.") if is_group else [f"{at}{name}"]


def _fields(file: str, class_name: str) -> set[str]:
    """The fields of a configuration class, read off its source."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _find_runs(above: str) -> Iterator[str]:
    level, seen = [above], 0
    for _ in range(DEPTH):
        below: list[str] = []
        for folder in level:
            for name in _folders_in(folder):
                seen += 1
                path = os.path.join(folder, name)
                if os.path.isfile(os.path.join(path, RUN_FILE)):
                    yield path
                elif seen < MOST_FOLDERS:
                    below.append(path)
        level = below


def _folders_in(folder: str) -> list[str]:
    try:
        with os.scandir(folder or ".") as entries:
            return [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    except OSError:
        return []
