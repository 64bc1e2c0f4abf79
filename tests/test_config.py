from typing import Annotated, Literal

import pytest
from pydantic import Field

from mixora.config import Strict, override, parse, put, read_assignment, read_yaml
from mixora.errors import ConfigError
from mixora.files.documents import parse_yaml, write_yaml


class Small(Strict):
    kind: Literal["small"] = "small"
    rank: Annotated[int, Field(ge=1)] = 4


class Large(Strict):
    kind: Literal["large"] = "large"
    rank: int = 64
    width: tuple[int, ...] | int = 8


class Box(Strict):
    part: Annotated[Small | Large, Field(discriminator="kind")] = Small()
    boxes: dict[str, Small] = {}
    rate: float = 0.5


def test_nested_values_are_read_without_conversion():
    box = parse(Box, {"part": {"kind": "large", "width": [1, 2]}, "rate": 1})
    assert box.part == Large(width=(1, 2))
    assert box.rate == 1.0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"part": {"kind": "small", "rnak": 3}}, r"run\.part\.rnak: unknown key; did you mean 'rank'\?"),
        ({"rats": 3}, r"run\.rats: unknown key; did you mean 'rate'\?"),
        ({"part": {"kind": "small", "rank": "4"}}, r"run\.part\.rank: got '4'; valid: a valid integer"),
        ({"part": {"kind": "small", "rank": True}}, r"run\.part\.rank: got True"),
        ({"part": {"kind": "small", "rank": 0}}, r"run\.part\.rank: got 0; valid: greater than or equal to 1"),
        ({"part": {"kind": "lage"}}, r"run\.part\.kind: got 'lage'; valid: small, large; did you mean 'large'"),
        (
            {"part": {"kind": "large", "width": "x"}},
            r"run\.part\.width: got 'x'; valid: .*(array|tuple).* or .*integer",
        ),
        ({"boxes": {"a": {"rank": 1.5}}}, r"run\.boxes\.a\.rank: got 1\.5"),
        ({"rate": float("nan")}, r"run\.rate: got nan; valid: a finite number"),
        ({"boxes": {"a": [1.0, float("-inf")]}}, r"run\.boxes\.a\.1: got -inf; valid: a finite number"),
        ({"rate": {1, 2}}, r"run: .*valid: numbers"),
    ],
)
def test_every_mistake_names_its_path_and_what_is_valid(data, message):
    with pytest.raises(ConfigError, match=message):
        parse(Box, data, root="run")


def test_all_mistakes_come_in_one_error():
    with pytest.raises(ConfigError) as caught:
        parse(Box, {"rate": "fast", "part": {"kind": "small", "rank": -1}, "colour": "red"})
    assert len(str(caught.value).splitlines()) == 3


def test_plain_override_reaches_every_part_and_dotted_one():
    box = Box(boxes={"a": Small(), "b": Small()})
    changed = override(box, {"rank": 9, "boxes.b.rank": 2})
    assert (changed.part.rank, changed.boxes["a"].rank, changed.boxes["b"].rank) == (9, 9, 2)


@pytest.mark.parametrize("name", ["ranks", "boxes.c.rank", "part.boxes"])
def test_override_that_reaches_nothing_is_an_error(name):
    with pytest.raises(ConfigError, match=rf"{name}: reaches no part"):
        override(Box(boxes={"a": Small()}), {name: 1})


def test_assignments_are_yaml():
    assert read_assignment("a.b=[1, 2]") == ("a.b", [1, 2])
    assert read_assignment("a=x=y") == ("a", "x=y")
    for bad in ("abc", "=1"):
        with pytest.raises(ConfigError, match="valid: key=value"):
            read_assignment(bad)
    with pytest.raises(ConfigError, match="not a YAML value"):
        read_assignment("a=[1")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("2E6", 2e6),
        ("-1.5e3", -1500.0),
        ("1_0e+2", 1000.0),
        (".5e1", 5.0),
        ("1e", "1e"),
        ("e-3", "e-3"),
    ],
)
def test_numbers_with_an_exponent_need_no_point(text, value):
    found = read_assignment(f"a={text}")[1]
    assert found == value and type(found) is type(value)


def test_text_that_looks_like_a_number_is_written_as_text():
    tree = {"b": "1e-3", "a": 0.001, "c": "0.1", "é": ["-2e5", 1e-7]}
    assert parse_yaml(write_yaml(tree)) == tree
    assert write_yaml(tree).startswith("b: '1e-3'\na: 0.001\n")


def test_put_makes_groups_and_keeps_values():
    tree = {"a": {"b": 1}, "c": 2}
    put(tree, "a.d.e", 3)
    assert tree == {"a": {"b": 1, "d": {"e": 3}}, "c": 2}
    with pytest.raises(ConfigError, match="'c' is a value"):
        put(tree, "c.x", 1)
    deep = ".".join("abcdefgh" * 20)
    with pytest.raises(ConfigError, match=r"is nested too deeply; valid: at most \d+ levels"):
        put(tree, deep, 1)


def test_yaml_files(tmp_path):
    good, bad, listed = (tmp_path / n for n in ("good.yaml", "bad.yaml", "list.yaml"))
    good.write_text("a: 1\n")
    bad.write_text("a: [1\n")
    listed.write_text("- 1\n")
    assert read_yaml(good) == {"a": 1}
    with pytest.raises(ConfigError, match="line 2"):
        read_yaml(bad)
    with pytest.raises(ConfigError, match="valid: a mapping"):
        read_yaml(listed)
    with pytest.raises(ConfigError, match="no such file"):
        read_yaml(tmp_path / "none.yaml")
