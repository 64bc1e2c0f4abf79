"""What is known of an adapter for its card, and which of it may be told to strangers: no paths of this machine."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType

from mixora.diagnostics.record import RunRecord
from mixora.errors import ConfigError
from mixora.files.documents import decode, parse_yaml, read_bytes
from mixora.planning.plan import Plan
from mixora.short_names import SHORT_NAMES
from mixora.tuner import MixoraConfig

MOST_CARD_BYTES = 2**20
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")


@dataclass(frozen=True)
class Facts:
    """`base`: as the adapter names it. `weights`: what was read as the base, if that has another name.

    `record` and `settings`: of the run that trained it, where they are known. `place`: the folder or repository that
    it will be loaded from, if that is not where it is written. `outputs`: of a classifier's head; 1 for regression.
    """

    base: str
    task_type: str | None = None
    recipe: str | None = None
    plan: Plan | None = None
    record: RunRecord | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    weights: str | None = None
    place: str | None = None
    outputs: int | None = None

    @property
    def base_id(self) -> str | None:
        """The base on the hub, as far as its name tells."""
        if self.base in SHORT_NAMES:
            return SHORT_NAMES[self.base].origin
        return self.base if is_hub_id(self.base) else None

    @property
    def quantised_copy(self) -> str | None:
        """The file of a package that was read as the base, where its weights are not those of the original."""
        packaged = SHORT_NAMES.get(self.weights or self.base)
        is_copy = packaged is not None and packaged.inside.endswith(".gguf")
        return f"{packaged.inside} of the package {packaged.project}" if packaged and is_copy else None

    @property
    def sources(self) -> list[str]:
        """Where the rows came from."""
        data = self.settings.get("data") or {}
        tasks = data.get("tasks")
        # of a stranger's run nothing but its sections was checked
        rows = tasks.values() if isinstance(tasks, Mapping) else [data]
        return [str(task["source"]) for task in rows if isinstance(task, Mapping) and task.get("source")]


def facts_of(
    config: PeftConfig,
    *,
    base: str | None = None,
    outputs: int | None = None,
    record: RunRecord | None = None,
    settings: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> Facts:
    """What an adapter's configuration tells, with what is known of its run.

    `base`: where it has another name now. `outputs`: those of a classifier.
    """
    if licence is not None and not _LICENCE.fullmatch(licence):
        raise ConfigError(f"licence: got {licence!r}; valid: an identifier of the hub, such as apache-2.0, mit, gemma")
    plan = config.plan if isinstance(config, MixoraConfig) else None
    # a member of PEFT's enumeration, which prints as one, or its value
    task_type = None if config.task_type is None else TaskType(config.task_type).value
    return Facts(
        base=str(base or config.base_model_name_or_path),
        task_type=task_type,
        recipe=config.recipe if isinstance(config, MixoraConfig) else None,
        plan=None if plan is None else Plan.from_list(plan),
        record=record,
        settings=settings or {},
        licence=licence,
        outputs=outputs,
    )


def is_hub_id(name: str) -> bool:
    """Whether a name can be one of the hub's, and is no folder here."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def show_name(name: str) -> str:
    """What others may read of the name of a base or of rows: of a path here, its last part."""
    return name if is_hub_id(name) or name in SHORT_NAMES else Path(name).name or name


def licence_of_base(base: str) -> str | None:
    """The licence of a base, where its folder's own card or the table of short names says so."""
    for short, packaged in SHORT_NAMES.items():
        if base in (short, packaged.origin):
            return packaged.licence
    try:
        text = decode(read_bytes(Path(base) / "README.md", MOST_CARD_BYTES))
        _, header, _ = re.split(r"^---[ ]*$", text, maxsplit=2, flags=re.MULTILINE)
        found = parse_yaml(header)["license"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) and _LICENCE.fullmatch(found) else None
