"""Modules that are trained and saved whole beside an adapter: `modules_to_save`, and the heads that PEFT adds to it."""

from collections.abc import Collection, Iterable
from itertools import accumulate

from peft import PeftConfig

from mixora.errors import ConfigError

# by `task_type`; for some of them only after it has placed the adapter
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def names_of(config: PeftConfig) -> tuple[str, ...]:
    """What the paths of the modules end with that `config` trains whole."""
    given = getattr(config, "modules_to_save", None) or ()
    return tuple(dict.fromkeys((*given, *_HEADS.get(config.task_type or "", ()))))


def leave_out(paths: Collection[str], names: Iterable[str]) -> set[str]:
    """Those of the `paths` of one target that lie in no module that `names` trains whole, where PEFT adapts nothing.

    `ConfigError` for the path of such a module itself, and where none is left.
    """
    held = {path: holder for path in paths if (holder := _find_holder(path, names))}
    for path, (module, name) in held.items():
        if path == module or len(held) == len(paths):
            raise ConfigError(f"{path}: is adapted by a rule and trained whole by modules_to_save {name!r}")
    return {path for path in paths if path not in held}


def _find_holder(path: str, names: Iterable[str]) -> tuple[str, str] | None:
    """The outermost module trained whole that a path leads to or through, and its name; names match as in PEFT."""
    modules = accumulate(path.split("."), "{}.{}".format)
    return next(((module, name) for module in modules for name in names if module.endswith(name)), None)
