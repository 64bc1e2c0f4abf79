"""Mutants: what is changed, what is left alone, and how a change takes the place of a living function's code."""

import importlib.util
from itertools import pairwise

import pytest

pytest.importorskip("mutmut", reason="`make mutants` installs what makes mutants")

from benchmarks.reliability import mutants
from benchmarks.reliability.mutation import mutants_of, select
from benchmarks.reliability.trial import _living, _replace, attempt

SOURCE = '''"""A module of 1 text."""

from functools import cached_property


class Strict:
    pass


class Settings(Strict):
    """Settings, 2 of them."""

    size: "Annotated[int, 3]" = 4


class Counter:
    def __init__(self, start: "tuple[5]") -> None:
        """Begin at 6."""
        self.start = start

    @property
    def next(self) -> int:
        return self.start + 1


def count(start: int) -> list[int]:
    return [number for number in range(start) if number > 7]
'''


@pytest.fixture
def path(tmp_path):
    found = tmp_path / "sample.py"
    found.write_text(SOURCE)
    return found


def test_annotations_and_docstrings_are_left_alone_but_where_they_validate(path):
    made = select([path], None, 0)
    gone = {line for mutant in made for line in mutant.diff if line.startswith("-")}
    assert gone == {
        '-size: "Annotated[int, 3]" = 4',
        "-self.start = start",
        "-return self.start + 1",
        "-return [number for number in range(start) if number > 7]",
    }
    assert len({mutant.key for mutant in made}) == len(made)
    assert all(a.line <= b.line for a, b in pairwise(made))
    assert len({mutant.key for mutant in select([path], 3, 0)}) == 3
    inside = {mutant.function for mutant in made}
    assert inside == {None, ("Counter.__init__", 17), ("Counter.next", 21), ("count", 26)}


def load(path):
    spec = importlib.util.spec_from_file_location("sample", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_change_takes_the_place_of_living_code(path):
    sample = load(path)
    counter, living, found = sample.Counter(2), _living({str(path)}), {}
    for mutant in mutants_of(path):
        if mutant.function == ("Counter.next", 21):
            found[mutant.diff[1]] = attempt(lambda mutant=mutant: f"{_replace(mutant, living)} {counter.next}", 20)
    assert found == {"+return self.start - 1": "True 1", "+return self.start + 2": "True 4"}
    assert counter.next == 3


def test_what_becomes_of_a_fork():
    def hang():
        while True:
            pass

    assert attempt(lambda: "x" * 200_000, 20) == "x" * 200_000
    assert attempt(hang, 0.2) == "timeout"
    assert attempt(lambda: 1 / 0, 20) == "crash"


def test_survivors_are_explained_by_expressions():
    record = {"file": "mixora/routers/soft.py", "diff": ["-x.sum(dim=-1)", "+x.sum(dim=+1)"]}
    assert "two dimensions" in mutants.explain(record)
    assert mutants.explain({**record, "diff": ["-a", "+b"]}) is None
    assert mutants.is_killed("killed by x") and mutants.is_killed("timeout") and not mutants.is_killed("survived")
