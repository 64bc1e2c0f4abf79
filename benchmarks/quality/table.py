"""A table of the evidence: which methods are trained on which data, how often, and among which learning rates.

Written as `tables/NAME.yaml`, in the words of `mixora compare`, which counts and matches the parameters.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from benchmarks.quality.rows import select_rows
from mixora.bases import sketch_base
from mixora.comparison.matching import Matched, match_methods
from mixora.comparison.settings import MethodEntry, Setup
from mixora.config import parse, read_yaml
from mixora.errors import ConfigError
from mixora.planning.method import Method
from mixora.training.material import read_task
from mixora.training.run_config import DataSection, EvaluateSection, RunConfig, TrainSection
from mixora.tuner.serving import Served

TABLES = Path(__file__).parent / "tables"

Way = Served | Literal["soup"]
Rates = Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]


class Contender(MethodEntry):
    """A method of a table.

    `train`: what differs in its training. `served_by`: how it is measured, where the first way counts; `soup` are the
    experts that validation rows choose.
    """

    train: dict[str, Any] = {}
    served_by: Annotated[list[Way], Field(min_length=1)] = ["merged"]


class Table(Setup):
    """Methods compared in two stages.

    Each method is trained once with each of the `learning_rates`, and of the `more_rates` of a data set, with the seed
    `tuning_seed`, and measured on validation rows; then with its best rate and each of the `seeds`, and measured on the
    rows of `split`, by `evaluate` with the changes of `final`, and on those of the split that `also` names for its data
    set. `metrics`: by which each data set's runs are told apart; `beside`: those that are measured on the final rows
    and shown beside it. `group_by`: a field of the rows; whether experts serve different groups of it is tested too.
    `minutes`: what a trial was expected to take on one core, before the first was made.
    """

    methods: tuple[Contender, ...]
    seeds: int | tuple[int, ...] = 5
    question: str
    learning_rates: Rates
    more_rates: dict[str, Rates] = {}
    tuning_seed: int = 1000
    metrics: dict[str, str]
    beside: dict[str, tuple[str, ...]] = {}
    split: Literal["test", "validation"] = "test"
    also: dict[str, str] = {}
    final: dict[str, Any] = {}
    group_by: str | None = None
    minutes: float

    @model_validator(mode="after")
    def _every_data_set_has_a_metric(self) -> "Table":
        if set(self.metrics) != set(self.data):
            raise ValueError(f"metrics: got them for {', '.join(self.metrics)}; valid: for {', '.join(self.data)}")
        if self.tuning_seed in self.seed_list:
            raise ValueError(f"tuning_seed: got {self.tuning_seed}, which is one of the seeds; valid: any other")
        return self

    def rates_of(self, data: str) -> Rates:
        """The learning rates that every method is tried with on a data set, the lowest first."""
        return tuple(sorted((*self.learning_rates, *self.more_rates.get(data, ()))))


@dataclass(frozen=True)
class Trial:
    """One training with its measurement. `stage`: `tuning` or `final`."""

    table: str
    data: str
    method: str
    stage: str
    rate: float
    seed: int
    config: RunConfig
    served_by: tuple[Way, ...]
    also: str | None
    group_by: str | None

    @property
    def key(self) -> tuple[str, str, str, str, float, int]:
        """What tells it from all others."""
        return (self.table, self.data, self.method, self.stage, self.rate, self.seed)

    @cached_property
    def digest(self) -> str:
        """Stands for all settings that its result depends on, beside the code; of the adapter, its numbers."""
        tree: dict[str, Any] = self.config.model_dump(
            mode="json", exclude={"out", "title", "adapter"}, exclude_defaults=True
        )
        built = self.config.adapter.build()
        method = built.method.model_dump(mode="json", exclude_defaults=True)
        adapter = {**method, "kinds": _kinds_of(built.method), "modules_to_save": built.modules_to_save}
        looks = {"served_by": list(self.served_by), "also": self.also, "group_by": self.group_by}
        text = json.dumps([self.stage, {**tree, "adapter": adapter, **looks}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _kinds_of(method: Method) -> list[str]:
    """Of the parts, in order: each is the default of its own settings, so that a dump without defaults lacks it."""
    rules = [part.kind for rule in method.rules.values() for part in (rule.expert, rule.router)]
    return [*rules, method.allocator.kind]


def table_names() -> list[str]:
    """All tables, in the order of their files."""
    return sorted(path.stem for path in TABLES.glob("*.yaml"))


@cache
def read_table(name: str) -> Table:
    """The table `name`, or with `NAME@BASE` the same on another base; `ConfigError` names what is wrong."""
    file, _, base = name.partition("@")
    path = TABLES / f"{file}.yaml"
    if not path.is_file():
        raise ConfigError(f"table: got {file!r}; valid: {', '.join(table_names())}")
    table = parse(Table, read_yaml(path))
    return table.model_copy(update={"model": table.model.model_copy(update={"base": base})}) if base else table


@cache
def data_of(name: str, data: str) -> DataSection:
    """A data set of the table; where answers are written or chosen, only rows that its `max_length` leaves whole."""
    table = read_table(name)
    section = table.data[data]
    if section.source is None:
        return section
    return section.model_copy(update={"source": select_rows(section.source, table.model.base, section.max_length)})


@cache
def match_table(name: str, data: str) -> Mapping[str, Matched]:
    """How each method of the table is run on `data`, by name."""
    table = read_table(name)
    sections: dict[str, Any] = {"model": table.model, "data": data_of(name, data), "evaluate": table.evaluate}
    task, _ = read_task(RunConfig(**sections))
    return match_methods(sketch_base(table.model.base, task=task, dtype=table.model.dtype), table)


@cache
def tuning_trials(name: str, data: str, method: str) -> list[Trial]:
    """One for each learning rate, on validation rows."""
    table = read_table(name)
    return [_make(name, data, method, "tuning", rate, table.tuning_seed) for rate in table.rates_of(data)]


@cache
def final_trials(name: str, data: str, method: str, rate: float) -> list[Trial]:
    """One for each seed, with the rate that tuning chose."""
    return [_make(name, data, method, "final", rate, seed) for seed in read_table(name).seed_list]


def _make(name: str, data: str, method: str, stage: str, rate: float, seed: int) -> Trial:
    table = read_table(name)
    contender = next(entry for entry in table.methods if entry.name == method)
    train = {**table.train.model_dump(), **contender.train, "learning_rate": rate, "seed": seed, "log_every": 1000}
    is_final = stage == "final"
    evaluate = {**table.evaluate.model_dump(), **(table.final if is_final else {})}
    if not is_final:
        evaluate["metrics"] = (table.metrics[data],)
    elif data in table.beside:
        evaluate["metrics"] = (table.metrics[data], *table.beside[data])
    split = table.split if is_final else "validation"
    sections: dict[str, Any] = {
        "model": table.model,
        "data": data_of(name, data).model_copy(update={"evaluation_split": split}),
        "adapter": match_table(name, data)[method].adapter,
        "train": parse(TrainSection, train),
        "evaluate": parse(EvaluateSection, evaluate),
    }
    served_by = tuple(contender.served_by if is_final else contender.served_by[:1])
    looks = (table.also.get(data), table.group_by) if is_final else (None, None)
    return Trial(name, data, method, stage, rate, seed, RunConfig(**sections), served_by, *looks)
