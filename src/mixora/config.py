"""Strict configuration: frozen models, errors with the dotted path and a suggestion, `key=value` overrides.

Knows nothing of mixtures: the parts (experts, routers, losses, data, ...) each keep their own `Strict` model
beside the class it configures.
"""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mixora.errors import ConfigError
from mixora.files.documents import MOST_LEVELS, MOST_YAML_BYTES, UnreadableError, decode, parse_yaml, read_bytes, show

Tree = dict[str, Any]
# what a 32-bit number of rows, steps or tokens can be
Whole = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Strict(BaseModel):
    """Base of every configuration model: frozen, no unknown keys, no silent conversion of types.

    `replaces`: fields that have no effect beside another one, by name, with that other one: an `override` of the first
    takes the second away.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, validate_default=True)
    replaces: ClassVar[Mapping[str, str]] = {}


S = TypeVar("S", bound=Strict)


def parse(model: type[S], data: Mapping[str, Any], root: str = "") -> S:
    """Read `data` as `model`; every problem is reported in one `ConfigError`, each with its dotted path.

    Validation runs on the JSON form, so lists serve as tuples while numbers, strings and booleans are never converted
    into each other. `root` is put before each path in messages.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{root or 'config'}: got {show(data)}; valid: a mapping of settings")
    try:
        text = json.dumps(data, allow_nan=False)
        return model.model_validate_json(text)
    except RecursionError:
        raise ConfigError(f"{root or 'config'}: is nested too deeply; valid: at most {MOST_LEVELS} levels") from None
    except (TypeError, ValueError) as error:
        if isinstance(error, ValidationError):
            # keys as JSON has them: strings
            raise ConfigError("\n".join(_describe(error, model, json.loads(text), root))) from None
        infinite = [f"{path}: got {value}; valid: a finite number" for path, value in _not_finite(data, root)]
        other = f"{root or 'config'}: {error}; valid: numbers, strings, booleans, lists, mappings"
        raise ConfigError("\n".join(infinite) or other) from None


def _not_finite(value: Any, at: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float) and not math.isfinite(value):
        yield at, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for name, child in items:
        yield from _not_finite(child, f"{at}.{name}" if at else str(name))


def _describe(error: ValidationError, model: type[Strict], data: Tree, root: str) -> list[str]:
    merged: dict[str, tuple[Any, list[str]]] = {}
    for item in error.errors(include_url=False):
        path = _data_path(item["loc"], data, may_be_missing=item["type"] == "missing")
        dotted = ".".join(p for p in (root, *map(str, path)) if p)
        if item["type"] == "extra_forbidden":
            siblings = _fields_at(model, item["loc"][:-1])
            merged[dotted] = ("", [f"unknown key{did_you_mean(str(path[-1]), siblings)}"])
        elif item["type"] == "missing":
            merged[dotted] = ("", ["is required"])
        elif item["type"] == "too_short" and item["ctx"]["actual_length"] < len(item["input"]):
            # pydantic counts what is valid, and tells of the others by themselves
            continue
        elif item["type"] == "value_error":
            merged.setdefault(dotted, ("", []))[1].append(str(item["ctx"]["error"]))
        else:
            valid = re.sub(r"^Input should be |^\w+ should have (?=at )| after validation, not.*", "", item["msg"])
            if item["type"] == "union_tag_invalid":
                tags = [t.strip().strip("'") for t in item["ctx"]["expected_tags"].split(",")]
                valid = ", ".join(tags) + did_you_mean(str(item["ctx"]["tag"]), tags)
                dotted += ".kind"
                merged[dotted] = (f"got {show(item['ctx']['tag'])}", [valid])
                continue
            merged.setdefault(dotted, (f"got {show(item['input'])}", []))[1].append(valid)
    return [_sentence(dotted, got, valid) for dotted, (got, valid) in merged.items()]


def _sentence(dotted: str, got: str, valid: list[str]) -> str:
    says = " or ".join(dict.fromkeys(valid))
    return f"{dotted}: {got}; valid: {says}" if got else (f"{dotted}: {says}" if dotted else says)


def _data_path(loc: Iterable[int | str], data: Any, may_be_missing: bool) -> list[int | str]:
    """The part of pydantic's location that exists in the data: union tags are left out."""
    path: list[int | str] = []
    steps = list(loc)
    for place, step in enumerate(steps):
        held = step in data if isinstance(data, Mapping) else isinstance(data, list) and step in range(len(data))
        if held:
            data = data[step]
        elif not (may_be_missing and isinstance(data, Mapping) and place == len(steps) - 1):
            continue
        path.append(step)
    return path


def _fields_at(model: type[BaseModel], loc: Iterable[int | str]) -> list[str]:
    """Field names of the model found by following `loc` from `model`."""
    here: Any = model
    for step in loc:
        candidates = [m for m in _models_in(here) if str(step) in m.model_fields]
        if candidates:
            here = candidates[0].model_fields[str(step)].annotation
            continue
        tagged = [m for m in _models_in(here) if _tag(m) == step]
        here = tagged[0] if tagged else here
    return sorted({name for m in _models_in(here) for name in m.model_fields})


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [m for arg in getattr(annotation, "__args__", ()) for m in _models_in(arg)]


def _tag(model: type[BaseModel]) -> Any:
    field = model.model_fields.get("kind")
    return field.default if field else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, followed by all of them; for the end of an error message."""
    known = sorted(set(known))
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"{hint} (known: {', '.join(known)})" if known else hint


def read_yaml(path: str | Path) -> Tree:
    """The mapping in a YAML file of at most `MOST_YAML_BYTES`; `ConfigError` says what cannot be read, and where."""
    try:
        tree = parse_yaml(decode(read_bytes(path, MOST_YAML_BYTES)))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: got {type(tree).__name__}; valid: a mapping of settings")
    return tree


def read_assignment(text: str) -> tuple[str, Any]:
    """`"a.b=[1, 2]"` as `("a.b", [1, 2])`; the value is read as YAML."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise ConfigError(f"got {show(text)}; valid: key=value, for example train.steps=100")
    try:
        return name.strip(), parse_yaml(value)
    except UnreadableError as error:
        raise ConfigError(f"{name.strip()}: got {show(value)}, which is not a YAML value: {error}") from None


def put(tree: Tree, dotted: str, value: Any) -> None:
    """Set `tree["a"]["b"]` for `"a.b"`, making mappings on the way."""
    *way, last = dotted.split(".")
    if len(way) > MOST_LEVELS:
        raise ConfigError(f"{show(dotted)}: is nested too deeply; valid: at most {MOST_LEVELS} levels")
    here = tree
    for step in way:
        here = here.setdefault(step, {})
        if not isinstance(here, dict):
            raise ConfigError(f"{dotted}: {step!r} is a value, not a group of settings")
    here[last] = value


def merge_trees(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> Tree:
    """A copy of `tree` with `changes` in force; mappings are merged at every depth, other values replaced."""
    merged = dict(tree)
    for name, value in changes.items():
        here = merged.get(name)
        merged[name] = merge_trees(here, value) if isinstance(here, Mapping) and isinstance(value, Mapping) else value
    return merged


def override(config: S, settings: Mapping[str, Any], root: str = "") -> S:
    """A copy of `config` with `settings` in force.

    A plain name (`rank`) reaches every part that has such a field; a dotted one (`rules.attention.expert.rank`)
    reaches one. A name that reaches nothing is a `ConfigError`. What a setting `replaces` becomes None, unless it is
    among the settings too.
    """
    kinds = {name: value for name, value in settings.items() if name.rpartition(".")[2] == "kind"}
    if kinds and kinds.keys() != settings.keys():
        # which other names there are depends on the kinds
        rest = {name: value for name, value in settings.items() if name not in kinds}
        return override(override(config, kinds, root), rest, root)
    tree = config.model_dump(mode="json")
    owners = dict(_field_paths(config))
    paths, changes = list(owners), []
    leaves = [p for p in paths if not any(other.startswith(p + ".") for other in paths)]
    for name, value in settings.items():
        reached = [p for p in leaves if p.rpartition(".")[2] == name] or [p for p in paths if p == name]
        if not reached:
            known = paths if "." in name else [p.rpartition(".")[2] for p in leaves]
            raise ConfigError(f"{name}: reaches no part of this recipe{did_you_mean(name, known)}")
        changes += [(path, value) for path in reached]
    replaced = [_replaced_by(path, owners[path]) for path, _ in changes]
    for path, value in [*((path, None) for path in replaced if path), *changes]:
        put(tree, path, value)
    return parse(type(config), tree, root)


def _replaced_by(path: str, owner: Strict | Mapping[str, Any]) -> str | None:
    """The path of the field that the one at `path`, a field of `owner`, replaces; None for most."""
    above, _, name = path.rpartition(".")
    other = owner.replaces.get(name) if isinstance(owner, Strict) else None
    return f"{above}.{other}" if other else None


def _field_paths(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of every field below `value`, through models and dictionaries of models, with what holds it."""
    items = [(name, getattr(value, name)) for name in type(value).model_fields] if isinstance(value, Strict) else []
    if isinstance(value, Mapping):
        items = [(name, child) for name, child in value.items() if isinstance(child, Strict)]
    for name, child in items:
        path = f"{at}.{name}" if at else name
        yield path, value
        yield from _field_paths(child, path)
