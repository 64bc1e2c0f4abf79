"""JSON and YAML as people mean them, within bounds: no key twice, no half characters, no NaN, nothing that unfolds.

Readers raise `UnreadableError`, whose text says why; whoever knows the file makes an error of `errors` of it.
"""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MOST_YAML_BYTES = 2**20
MOST_JSON_BYTES = 2**26
MOST_LEVELS = 100
MOST_NODES = 100_000
MOST_DIGITS = 100

_EXPONENTIAL = re.compile(r"[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9]+)[eE][-+]?[0-9]+$")
_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class UnreadableError(ValueError):
    """Why a text is not what it should be."""


def read_bytes(path: str | os.PathLike[str], most: int) -> bytes:
    """The content of a file of at most `most` bytes. Raises `UnreadableError`, and `OSError` as files do."""
    with Path(path).open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise UnreadableError(f"holds more than {most:,} bytes; valid: at most that")
    return content


def find_path(name: str | os.PathLike[str]) -> Path:
    """A path, there or not; `UnreadableError` for what can be none, or is not for us to look at."""
    try:
        path = Path(name)
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError, RuntimeError) as error:
        raise UnreadableError(f"is no path here: {getattr(error, 'strerror', None) or error}") from None
    return path


def decode(content: bytes) -> str:
    """UTF-8 with or without a mark at its start."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UnreadableError(f"line {line} is not UTF-8") from None


def parse_json(text: str, finite: bool = True) -> Any:
    """The value of a JSON text; a key that comes twice, half a surrogate pair and deep nesting are refused.

    So are NaN and Infinity, which are no JSON, if `finite`; Python writes them for what is not finite.
    """
    try:
        value = json.loads(text, object_pairs_hook=_collect, parse_constant=_refuse_constant if finite else float)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}" if "\n" in text.rstrip() else f"column {error.colno}"
        raise UnreadableError(f"is not JSON: {error.msg} at {place}") from None
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except UnreadableError:
        raise
    except ValueError:
        raise UnreadableError("holds a number of more than 4300 digits") from None
    if text.count("[") + text.count("{") > MOST_LEVELS:
        check_depth(value)
    if _MAYBE_HALF.search(text):
        check_characters(value)
    return value


_TOO_DEEP = f"is nested too deeply; valid: at most {MOST_LEVELS} levels"


def _collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise UnreadableError(f"has the key {show(twice)} twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise UnreadableError(f"is not JSON: {name} is no number there")


def check_depth(value: Any) -> None:
    """`UnreadableError` for lists and mappings in each other over more than `MOST_LEVELS` levels."""
    level = [value]
    for _ in range(MOST_LEVELS):
        level = [child for parent in level for child in _children(parent) if isinstance(child, dict | list | tuple)]
        if not level:
            return
    raise UnreadableError(_TOO_DEEP)


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple):
        yield from value


def check_characters(value: Any) -> None:
    """`UnreadableError` for text that no encoding can hold: one half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise UnreadableError(f"holds \\u{ord(half):04x}, half of a surrogate pair, which is no character") from None


def read_json(path: str | os.PathLike[str], finite: bool = True) -> dict[str, Any]:
    """The object in a JSON file of at most `MOST_JSON_BYTES`. Raises `UnreadableError`, and `OSError` as files do."""
    value = parse_json(decode(read_bytes(path, MOST_JSON_BYTES)), finite)
    if not isinstance(value, dict):
        raise UnreadableError(f"got {type(value).__name__}; valid: an object of settings")
    return value


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, without code: a key that comes twice, deep nesting and unfolding are refused."""
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UnreadableError(str(error)) from None
    except RecursionError:
        raise UnreadableError(_TOO_DEEP) from None
    except UnreadableError:
        raise
    except (ValueError, OverflowError, TypeError, AttributeError, LookupError) as error:
        # what the library raises of dates, numbers and tags that are none
        raise UnreadableError(f"holds a value that is none: {error}") from None


class _Loader(yaml.SafeLoader):
    """Counts nodes as they are after aliases are unfolded, so that a short text stays a small value."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._nodes = 0
        self._sizes: dict[int, int] = {}
        self._open: set[str] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in self._open:
                raise UnreadableError(f"the alias {show(event.anchor)} stands inside of what it names")
            node: Any = super().compose_node(parent, index)
            self._count(self._sizes[id(node)])
            return node
        self._depth += 1
        if self._depth > MOST_LEVELS:
            raise UnreadableError(_TOO_DEEP)
        before = self._nodes
        self._count(1)
        self._open.add(event.anchor)
        node = super().compose_node(parent, index)
        self._open.discard(event.anchor)
        self._depth -= 1
        self._sizes[id(node)] = self._nodes - before
        return node

    def _count(self, more: int) -> None:
        self._nodes += more
        if self._nodes > MOST_NODES:
            raise UnreadableError(f"holds more than {MOST_NODES:,} values, aliases unfolded; valid: at most that")

    def compose_mapping_node(self, anchor: Any) -> Any:
        node: Any = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise UnreadableError(f"line {key.start_mark.line + 1}: has the key {show(key.value)} twice")
                seen.add((key.tag, key.value))
        return node

    def construct_number(self, node: Any) -> Any:
        if len(node.value) > MOST_DIGITS:
            raise UnreadableError(f"holds a number of more than {MOST_DIGITS} digits")
        read = self.construct_yaml_int if node.tag.endswith(":int") else self.construct_yaml_float
        return read(node)


class _Dumper(yaml.SafeDumper):
    """Puts text in quotes that the loader would read as a number."""


for _tag in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _Loader.construct_number)
for _way in (_Loader, _Dumper):
    # YAML 1.2 has it so; the library, of 1.1, takes 1e-3 for text
    _way.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENTIAL, list("-+.0123456789"))


def write_yaml(tree: Any) -> str:
    """`tree` as YAML text that `parse_yaml` reads as the same, its keys in their order."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def show(value: Any, most: int = 200) -> str:
    """What a message shows of a value: its `repr`, cut."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"
