"""A saved adapter of each recipe on each kind of base, written once."""

import pytest

from tests.behaviours.cases import logits, wrap


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """`saved(recipe, kind)`: the folder of an adapter, and what it computes."""
    known = {}

    def save(recipe, kind="decoder"):
        if (recipe, kind) not in known:
            folder = tmp_path_factory.mktemp(f"{recipe}-{kind}")
            model = wrap(recipe, kind)
            model.save_pretrained(folder)
            known[recipe, kind] = folder, logits(model, kind)
        return known[recipe, kind]

    return save
