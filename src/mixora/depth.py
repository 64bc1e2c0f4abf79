"""Values that change over depth: one number for all layers, a list from the first layer to the last, or a line.

Depth counts the layers of one stack (an encoder and a decoder each have their own) that a rule matches.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import Discriminator, Field, Tag
from typing_extensions import TypedDict

from mixora.config import Strict
from mixora.errors import ConfigError

MOST = 2**16
# wider than any model; each expert costs some work in a plan, so that one bound serves all counts
Count = Annotated[int, Field(ge=1, le=MOST)]
# a plain dictionary, since `from` is no name in Python; overrides put it in place as one value
Line = TypedDict("Line", {"from": Count, "to": Count})
Line.__pydantic_config__ = {"extra": "forbid", "strict": True}  # type: ignore[attr-defined]
C = TypeVar("C", bound=Strict)


class _Varies:
    """Marks the fields of a configuration that `settle` makes one number."""


def _form(value: Any) -> str:
    return "line" if isinstance(value, Mapping) else "list" if isinstance(value, list | tuple) else "number"


if TYPE_CHECKING:
    OverDepth: TypeAlias = Any  # an int wherever a part runs
else:
    OverDepth = Annotated[
        Annotated[Count, Tag("number")]
        | Annotated[tuple[Count, ...], Field(min_length=1), Tag("list")]
        | Annotated[Line, Tag("line")],
        Discriminator(_form),
        _Varies(),
    ]


def is_line(value: Any) -> bool:
    """Whether `value` is a mapping `{from: a, to: b}`, which is one value and no group of settings."""
    return isinstance(value, Mapping) and set(value) == {"from", "to"}


@dataclass(frozen=True)
class Depth:
    """Place `layer` (from 0) among the `layers` layers of `stack` that a rule matches."""

    stack: str
    layer: int
    layers: int


def depths_of(paths: Iterable[str]) -> dict[str, Depth]:
    """The depth of each module path of one rule; what stands outside of numbered layers is a stack of one layer."""
    places = {}
    for path in paths:
        numbered = re.match(r"(.*?)\.(\d+)\.", path)
        places[path] = (numbered[1], int(numbered[2])) if numbered else (path, 0)
    stacks: dict[str, list[int]] = {}
    for stack, layer in sorted(set(places.values())):
        stacks.setdefault(stack, []).append(layer)
    return {
        path: Depth(stack, stacks[stack].index(layer), len(stacks[stack])) for path, (stack, layer) in places.items()
    }


def value_at(value: Any, depth: Depth, where: str) -> int:
    """The number that a field has at `depth`; `where` heads the error's message.

    A list of n values cuts L layers into n groups: layer l gets value number l * n // L. A line is rounded to the
    nearest number, halves up. Raises `ConfigError` for a list with more values than there are layers.
    """
    if isinstance(value, int):
        return value
    if isinstance(value, Mapping):
        steps = max(depth.layers - 1, 1)
        return (2 * (value["from"] * (steps - depth.layer) + value["to"] * depth.layer) + steps) // (2 * steps)
    if len(value) > depth.layers:
        layers = "1 layer" if depth.layers == 1 else f"{depth.layers} layers"
        raise ConfigError(
            f"{where}: got {len(value)} values for the {layers} of {depth.stack}; valid: at most one for each layer"
        )
    return value[depth.layer * len(value) // depth.layers]


def settle(config: C, depth: Depth, where: str) -> C:
    """`config` with one number in each field that may vary over depth."""
    varying = [name for name in type(config).model_fields if varies(config, name)]
    return fix(config, **{name: value_at(getattr(config, name), depth, f"{where}.{name}") for name in varying})


def varies(config: Strict, name: str) -> bool:
    """Whether a configuration has a field of that name that may vary over depth."""
    field = type(config).model_fields.get(name)
    return field is not None and any(isinstance(mark, _Varies) for mark in field.metadata)


def fix(config: C, **values: Any) -> C:
    """`config` with those of `values` that it has fields for."""
    return config.model_copy(
        update={name: value for name, value in values.items() if name in type(config).model_fields}
    )
