"""The configuration of a mixture adapter, and what follows from it before a model is changed."""

import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any

from peft import PeftConfig
from torch import nn

from mixora.config import did_you_mean, override, parse
from mixora.display.stages import Advance
from mixora.errors import ConfigError
from mixora.files.documents import show
from mixora.host import versions
from mixora.planning import whole_modules
from mixora.planning.admission import remark_untrained
from mixora.planning.allocation import Batches, choose_ranks, is_settled
from mixora.planning.assembly import make_plan
from mixora.planning.method import Method
from mixora.planning.plan import Plan
from mixora.recipes import read_recipe


@dataclass
class MixoraConfig(PeftConfig):
    """Configuration of a mixture adapter, for `peft.get_peft_model` and everything else that takes a `PeftConfig`.

    `rules`, `losses`, `allocator` and `allocation` are a `mixora.planning.method.Method` as plain data (`mixora.recipe`
    fills them, and `mixora.allocate` the last), `recipe` the name they came from. `modules_to_save` as in PEFT. `plan`
    is written when the adapter is made and compared when it is loaded.
    Raises `ConfigError` for unknown or impossible settings.
    """

    recipe: str | None = None
    rules: dict[str, Any] = field(default_factory=dict)
    losses: dict[str, Any] = field(default_factory=dict)
    allocator: dict[str, Any] | None = None
    allocation: dict[str, Any] | None = None
    modules_to_save: list[str] | None = None
    plan: list[dict[str, Any]] | None = None

    # read by PEFT on every config; sites are chosen by the rules
    target_modules = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "MixoraConfig":
        """Refuse unknown settings, which PEFT would drop with a warning."""
        known = {f.name for f in fields(cls)}
        for name in kwargs.keys() - known:
            raise ConfigError(f"{name}: unknown key{did_you_mean(name, known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = versions.MIXORA
        names: Any = self.modules_to_save
        if names is not None and not (isinstance(names, list | tuple | set) and all(isinstance(n, str) for n in names)):
            raise ConfigError(f"modules_to_save: got {show(names)}; valid: a list of names of modules, or none")
        given = {part: getattr(self, part) for part in Method.model_fields}
        self.method = parse(Method, {part: value for part, value in given.items() if value is not None})
        for part, value in self.method.model_dump(mode="json").items():
            setattr(self, part, value)


def recipe(name: str, /, **overrides: Any) -> MixoraConfig:
    """The configuration of a named method (see `mixora recipes`) with overrides in force.

    Plain names (`num_experts=16`) reach every part of the recipe that has such a field, dotted ones
    (`**{"rules.attention.expert.rank": 8}`) one. Fields of `PeftConfig` (`task_type`, `modules_to_save`, ...) may be
    given as well. Raises `ConfigError` for an unknown recipe, a name that reaches nothing, or an impossible value.
    """
    peft_names = {f.name for f in fields(MixoraConfig)} - {"recipe", "plan", "peft_type", *Method.model_fields}
    for_peft = {key: overrides.pop(key) for key in peft_names & overrides.keys()}
    method = override(Method.model_validate(read_recipe(name).model_dump(include=set(Method.model_fields))), overrides)
    return MixoraConfig(recipe=name, **method.model_dump(mode="json"), **for_peft)


def plan(model: nn.Module, config: MixoraConfig) -> Plan:
    """The table of sites that `config` makes on `model` (which may stand on the meta device). Changes neither.

    A budget that is not allocated yet is allocated for this plan. Raises `ConfigError` where the two do not fit.
    """
    _check(config)
    whole = whole_modules.names_of(config)
    found = make_plan(model, allocate(model, config).method, whole)
    untrained = remark_untrained(model, found, whole) if config.task_type == "SEQ_CLS" else ()
    return replace(found, notes=(*found.notes, *untrained))


def allocate(
    model: nn.Module, config: MixoraConfig, batches: Batches | None = None, progress: Advance | None = None
) -> MixoraConfig:
    """A copy of `config` with the ranks of each site's experts in `allocation`, as its `allocator` chooses them.

    `model` is the base. `batches`: what the model's forward takes, labels included; only `sensitivity` looks at them.
    `progress` is told (done, total). An allocation that `config` already holds stays, and is checked against `model`.
    Without a budget, allocator `groups` leaves the rules as they are. Raises `ConfigError` for a budget that cannot
    be met, and `ModelError` or `DataError` for weights and batches that the allocator cannot read.
    """
    _check(config)
    found, whole = copy.copy(config), whole_modules.names_of(config)
    if not is_settled(model, config.method, whole):
        ranks = choose_ranks(model, config.method, whole, batches, progress)
        found.method = config.method.model_copy(update={"allocation": ranks})
        found.allocation = found.method.model_dump(mode="json")["allocation"]
    return found


def _check(config: Any) -> None:
    if not isinstance(config, MixoraConfig):
        raise ConfigError(f"config: got {show(config)}; valid: a MixoraConfig, as mixora.recipe('sira') gives it")
