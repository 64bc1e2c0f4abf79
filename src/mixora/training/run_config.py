"""What a run consists of: model, adapter, data, training, evaluation. Read from a file, the command line, or both."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from mixora.config import Strict, Whole, did_you_mean, parse, read_yaml
from mixora.data import EncodingConfig
from mixora.depth import is_line
from mixora.errors import ConfigError
from mixora.evaluate import EvaluationConfig
from mixora.tuner import MixoraConfig, recipe
from mixora.tuner.serving import Served

# a path in one's home may begin with ~, also where no shell reads it; transformers' trainer takes it so
Place = Annotated[str, AfterValidator(os.path.expanduser)]
Folder = Annotated[Place, Field(min_length=1)]


class ModelSection(Strict):
    """`base`: a folder, GGUF file, hub id or short name. `task`: `auto` follows from the data and the base.

    `attn_implementation`: the name that transformers knows it by (`sdpa`, `eager`, `flash_attention_2`, ...), or None
    for its own choice.
    """

    base: str
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attn_implementation: str | None = None
    task: Literal["auto", "causal-lm", "sequence-classification", "seq2seq-lm"] = "auto"


class AdapterSection(Strict):
    """`recipe`, and beside it any overrides that the recipe takes: `rank: 8`, `rules: {attention: {...}}`."""

    model_config = ConfigDict(extra="allow")

    recipe: str = "sira"

    def build(self, **for_peft: Any) -> MixoraConfig:
        """The adapter's configuration; `ConfigError` names the path of what is wrong."""
        try:
            return recipe(self.recipe, **dict(leaves_of(self.model_extra or {})), **for_peft)
        except ConfigError as error:
            raise ConfigError(f"adapter: {error}") from None


def leaves_of(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of each setting; a line over depth is one value."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and not is_line(value):
            yield from leaves_of(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


class TaskSection(Strict):
    """The rows of one task of several; for what is None, the section `data` says it for all tasks.

    `weight`: how often the task is drawn, beside the weights of the others.
    """

    source: Place
    form: str | None = None
    train_rows: Whole | None = None
    evaluation_split: str | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class MixingSection(Strict):
    """How often each task is drawn, where none has a weight: in proportion to min(rows, limit)^(1/temperature)."""

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    limit: Whole | None = None


class DataSection(EncodingConfig):
    """Rows and how they become tokens.

    `source`: a file, a folder with train and validation files, or a hub id; or `tasks`: several, by name. `mixing`: how
    often each task is drawn. `form`: told from the fields if not given. `train_rows`: the first so many only.
    `evaluation_split`: rows to evaluate on; where the source lacks "validation", its "valid", "val" or "dev", else the
    last tenth of the training rows, which is held out.
    `group_by`: the field by which reports split the load of the experts; "task" where there are tasks, else "domain".
    """

    source: Place | None = None
    tasks: dict[str, TaskSection] | None = None
    mixing: MixingSection | None = None
    form: str | None = None
    train_rows: Whole | None = None
    evaluation_split: str = "validation"
    group_by: str | None = None

    @model_validator(mode="after")
    def _check_tasks(self) -> Self:
        if (self.source is None) == (self.tasks is None):
            got = "neither source nor tasks" if self.tasks is None else "both source and tasks"
            raise ValueError(f"got {got}; valid: one of them (null takes the other away)")
        weighted = [name for name, task in (self.tasks or {}).items() if task.weight is not None]
        if self.tasks is None:
            if self.mixing is not None:
                raise ValueError("mixing: has no effect on one source; valid: with tasks")
        elif not self.tasks:
            raise ValueError("tasks: got none; valid: one or more, or null beside a source")
        elif weighted and self.mixing is not None:
            raise ValueError(f"mixing: has no effect beside weights, which {', '.join(weighted)} has; valid: one kind")
        elif weighted and len(weighted) < len(self.tasks):
            lacking = ", ".join(name for name in self.tasks if name not in weighted)
            raise ValueError(f"tasks: no weight for {lacking}; valid: a weight for each task, or for none")
        return self

    @property
    def origin(self) -> str:
        """The source, or the names of the tasks."""
        return self.source or ", ".join(self.tasks or ())

    def by_task(self) -> dict[str, TaskSection]:
        """The tasks; a single source is one, named after its file or folder."""
        return self.tasks or {Path(self.origin).name: TaskSection(source=self.origin)}

    @property
    def weights(self) -> dict[str, float] | None:
        """The weight of each task, if they have any."""
        found = {name: task.weight for name, task in self.by_task().items() if task.weight is not None}
        return found or None


class TrainSection(Strict):
    """`steps` of the optimiser, or `epochs`. `batch_size`: the rows that each process takes at a time.

    `arguments`: further `transformers.TrainingArguments` by name. `fused_loss`: compute the cross entropy without the
    whole logits where that is exact. `save_every`: so many steps a checkpoint, from which an interrupted run goes on;
    the newest two stay until the run is finished, or with `keep_checkpoints` all of them, for good. `skip_bad_steps`:
    so many steps whose loss or gradients are not finite are left out; one more stops the run. `deterministic`:
    operators that give the same bits each time, or an error.
    """

    steps: Whole | None = None
    epochs: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    batch_size: Whole = 8
    gradient_accumulation: Whole = 1
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    warmup_steps: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Whole = 1
    save_every: Whole | None = None
    keep_checkpoints: bool = False
    fused_loss: bool = True
    skip_bad_steps: Annotated[int, Field(ge=0)] = 0
    deterministic: bool = False
    arguments: dict[str, Any] = {}


class EvaluateSection(EvaluationConfig):
    """`limit`: the first rows only. `generations`: how many answers the report shows before and after. Of each task.

    `served_by`: what serves where routes are drawn; see `mixora.served_by`.
    """

    generations: Annotated[int, Field(ge=0, le=1000)] = 3
    served_by: Served = "merged"


def read_settings(path: Path) -> dict[str, Any]:
    """The run file in a run's folder; `ConfigError` for one that cannot be read."""
    tree = read_yaml(path)
    check_names(tree)
    for section in ("model", "data", "adapter", "train", "evaluate"):
        if not isinstance(tree.get(section, {}), Mapping):
            raise ConfigError(f"{path}: {section}: got {tree[section]!r}; valid: a mapping of settings")
    return tree


def check_names(tree: Mapping[str, Any]) -> None:
    """`ConfigError` for a section that no run has."""
    for name in tree:
        if name not in RunConfig.model_fields:
            raise ConfigError(f"{name}: unknown key{did_you_mean(str(name), RunConfig.model_fields)}")


def read_run(tree: Mapping[str, Any]) -> "RunConfig":
    """The settings of a run; `ConfigError` with every mistake, the adapter's overrides included."""
    config = parse(RunConfig, tree)
    config.adapter.build()
    return config


class RunConfig(Strict):
    """A whole run; `out` is the folder of the adapter and the report."""

    model: ModelSection
    data: DataSection
    adapter: AdapterSection = AdapterSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    out: Folder = "runs/mixora"
    title: str | None = None
