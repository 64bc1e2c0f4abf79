"""Named methods as data: one YAML file each, with its paper and where it is implemented."""

from importlib.resources import files

import yaml

from mixora.config import did_you_mean, parse
from mixora.errors import ConfigError
from mixora.planning.method import Method


class Recipe(Method):
    """A method with its name for people: `title`, `paper` (reference), `about` (one sentence)."""

    title: str
    paper: str
    about: str


def recipe_names() -> tuple[str, ...]:
    """All named methods, in alphabetical order."""
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files(__name__).iterdir() if f.name.endswith(".yaml")))


def read_recipe(name: str) -> Recipe:
    """The recipe file of that name; `ConfigError` with a suggestion for an unknown one."""
    if name not in recipe_names():
        raise ConfigError(f"recipe: got {name!r}; valid: a known recipe{did_you_mean(name, recipe_names())}")
    text = files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return parse(Recipe, yaml.safe_load(text), root=name)
