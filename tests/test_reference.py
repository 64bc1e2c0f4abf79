"""The pages made from docstrings name what there is, all of it, and each name once."""

import inspect
from collections import Counter
from pathlib import Path
from pkgutil import resolve_name

import pytest
import yaml

import mixora
from mixora import contracts, errors

PAGES = sorted((Path(__file__).parents[1] / "docs" / "api").glob("*.md"))


def read_entries(page):
    """What a page shows: path in the source and name in the heading, from blocks as mkdocstrings reads them."""
    for block in page.read_text(encoding="utf-8").split("\n\n"):
        if block.startswith(":::"):
            first, _, rest = block.partition("\n")
            path = first.removeprefix(":::").strip()
            options = (yaml.safe_load(rest) or {}).get("options", {})
            yield path, options.get("heading", path)


ENTRIES = [entry for page in PAGES for entry in read_entries(page)]


@pytest.mark.parametrize(("path", "name"), ENTRIES, ids=[name for _, name in ENTRIES])
def test_what_a_page_names_is_there_and_says_what_it_is(path, name):
    shown = resolve_name(path)
    assert (getattr(mixora, name.removeprefix("mixora.")) if name.count(".") == 1 else resolve_name(name)) is shown
    assert inspect.getdoc(shown)
    # the source is read without being run, so the path has to lead to the definition
    assert f"{shown.__module__}.{shown.__qualname__}" == path


def test_every_public_name_is_shown_once():
    shown = Counter(name for _, name in ENTRIES)
    assert set(shown.values()) == {1}
    needed = {f"mixora.{name}" for name in mixora.__all__}
    for module in (contracts, errors):
        kinds = [kind for _, kind in inspect.getmembers(module, inspect.isclass) if kind.__module__ == module.__name__]
        needed |= {f"{module.__name__}.{kind.__name__}" for kind in kinds}
    assert needed <= set(shown), needed - set(shown)
    of_package = {name for name in shown if name.count(".") == 1}
    assert of_package <= needed, of_package - needed
