"""Parts from outside of mixora: a setting `kind: module:Class` names one.

To load a module is to run it, and settings come along with adapters that others made. So such a part loads only from a
module that this process, or its environment, was told to allow.
"""

import os
import re
from importlib import import_module
from typing import Any, TypeVar

from mixora.errors import ConfigError

ALLOWED = "MIXORA_ALLOW_PARTS"
"""The variable of the environment that names allowed modules, with commas between them."""

P = TypeVar("P")
_allowed: set[str] = set()


def allow_parts(*modules: str) -> None:
    """Let settings name parts in these modules and in those below them; `kind: my_routers:Nearest` runs `my_routers`.

    A part fulfils its family's contract in `mixora.contracts`, and its `Config.kind` is the name that it is used under.
    Raises `ConfigError` for what is no module's name.
    """
    for module in modules:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module):
            raise ConfigError(f"got {module!r}; valid: the name of a module, such as my_package.routers")
    _allowed.update(modules)


def is_outside(kind: object) -> bool:
    """Whether `kind` names a part outside of mixora."""
    return isinstance(kind, str) and ":" in kind


def load_part(kind: str, contract: type[P]) -> type[P]:
    """The class that `kind` (`module:Class`) names.

    Raises `ConfigError`, before anything is loaded, if its module is not allowed; also if there is no such class, or
    if it is none of `contract`.
    """
    module, _, name = kind.partition(":")
    if not _is_allowed(module):
        raise ConfigError(
            f"got kind {kind!r}, which is code outside of mixora; valid: a kind of mixora's own, or, if you trust that "
            f"code, mixora.allow_parts({module!r}) in Python or {ALLOWED}={module} in the environment"
        )
    try:
        found: Any = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"got kind {kind!r}: {error}; valid: module:Class of a module that can be imported") from None
    if not (isinstance(found, type) and issubclass(found, contract)):
        raise ConfigError(f"got kind {kind!r}, which is no {contract.__name__}; valid: a class that extends it")
    named = found.Config.model_fields["kind"].default  # type: ignore[attr-defined]
    if named != kind:
        raise ConfigError(f"got kind {kind!r}, but its Config.kind is {named!r}; valid: the same")
    return found


def _is_allowed(module: str) -> bool:
    allowed = {*_allowed, *map(str.strip, os.environ.get(ALLOWED, "").split(","))}
    steps = module.split(".")
    return any(".".join(steps[:count]) in allowed for count in range(1, len(steps) + 1))
