"""What a comparison consists of: the sections of a run, and the methods, seeds and data sets that they are run with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from mixora.config import Strict, did_you_mean, parse
from mixora.errors import ConfigError
from mixora.training.run_config import AdapterSection, DataSection, EvaluateSection, Folder, ModelSection, TrainSection

Parameters = Literal["trainable", "active"]
Seeds = Annotated[int, Field(ge=1, le=1000)]
# each is the name of a folder
Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]


class MethodEntry(AdapterSection):
    """A method to compare: `recipe`, and beside it any overrides that the recipe takes.

    `name`: the recipe's if not given. `vary`: what is chosen so that the parameters match: the `rank`, first one for
    all experts and then, where whole steps are too coarse, unequal ones; or the number of experts.
    """

    recipe: str
    name: Name
    vary: Literal["rank", "num_experts"] = "rank"

    @model_validator(mode="before")
    @classmethod
    def _name_by_recipe(cls, value: Any) -> Any:
        return {"name": value.get("recipe"), **value} if isinstance(value, Mapping) else value

    def adapter(self, **changes: Any) -> AdapterSection:
        """The section `adapter` of its runs, with dotted `changes`; `ConfigError` names the method."""
        section = parse(AdapterSection, {"recipe": self.recipe, **(self.model_extra or {}), **changes})
        try:
            section.build()
        except ConfigError as error:
            raise ConfigError(f"methods: {self.name}: {str(error).removeprefix('adapter: ')}") from None
        return section


class Match(Strict):
    """Each method gets as many `parameters` as method `reference` (the first if not given), within `tolerance`."""

    parameters: Parameters = "trainable"
    tolerance: Annotated[float, Field(gt=0)] = 0.02
    reference: str | None = None


class Setup(Strict):
    """Which methods are run on what.

    `data`: sections of a run by name; one section alone is named after its source. `adapter`: overrides that all
    methods take, where they do not say otherwise themselves. `seeds`: a list, or how many, from 0. `match`: null leaves
    every method as it is given.
    """

    model: ModelSection
    data: Annotated[dict[Name, DataSection], Field(min_length=1)]
    adapter: dict[str, Any] = {}
    methods: tuple[MethodEntry, ...]
    seeds: Seeds | Annotated[tuple[Annotated[int, Field(ge=0, lt=2**32)], ...], Field(min_length=1)] = 3
    match: Match | None = Match()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    title: str = "Comparison"

    @field_validator("methods", mode="before")
    @classmethod
    def _share_overrides(cls, methods: Any, known: ValidationInfo) -> Any:
        shared = known.data.get("adapter", {})
        if not isinstance(methods, list | tuple):
            return methods
        spelt = ({"recipe": method} if isinstance(method, str) else method for method in methods)
        return tuple({**shared, **method} if isinstance(method, Mapping) else method for method in spelt)

    @field_validator("methods")
    @classmethod
    def _are_some_with_unique_names(cls, methods: tuple[MethodEntry, ...]) -> tuple[MethodEntry, ...]:
        if not methods:
            raise ValueError("got []; valid: one method or more")
        names = [method.name for method in methods]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: is the name of two methods; valid: a `name` of its own for each")
        return methods

    @field_validator("seeds")
    @classmethod
    def _seeds_are_unique(cls, seeds: int | tuple[int, ...]) -> int | tuple[int, ...]:
        if not isinstance(seeds, int) and len(set(seeds)) < len(seeds):
            raise ValueError(f"got {list(seeds)}; valid: each seed once")
        return seeds

    @field_validator("train")
    @classmethod
    def _has_no_seed(cls, train: TrainSection) -> TrainSection:
        if "seed" in train.model_fields_set:
            raise ValueError("`seed` has no effect in a comparison; valid: `seeds`")
        return train

    @model_validator(mode="after")
    def _reference_is_a_method(self) -> Self:
        names = [method.name for method in self.methods]
        if self.match and self.match.reference not in (None, *names):
            near = did_you_mean(str(self.match.reference), names)
            raise ValueError(f"match.reference: got {self.match.reference!r}; valid: the name of a method{near}")
        return self

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds themselves."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else self.seeds

    @property
    def reference(self) -> str:
        """The method that the others are held against."""
        return (self.match and self.match.reference) or self.methods[0].name


class Comparison(Setup):
    """All of it. `out` is the folder of the runs and the results.

    `metric`: by which methods are told apart; `loss` if it is measured, else the first one that is.
    """

    metric: str | None = None
    out: Folder = "runs/comparison"


def read_comparison(tree: Mapping[str, Any]) -> Comparison:
    """The settings of a comparison; `ConfigError` with every mistake, those of the methods' overrides included."""
    data = tree.get("data") if isinstance(tree, Mapping) else None
    if isinstance(data, Mapping) and data.keys() & DataSection.model_fields.keys():
        tree = {**tree, "data": {Path(str(data.get("source", ""))).stem or "data": data}}
    comparison = parse(Comparison, tree)
    for method in comparison.methods:
        method.adapter()
    return comparison
