"""The result of a run opened again: the trained model with its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from mixora.config import did_you_mean, merge_trees, parse
from mixora.data import render_prompt
from mixora.diagnostics.measure import inspect
from mixora.diagnostics.residual import residual_energy
from mixora.display.stages import count
from mixora.errors import CheckpointError, ConfigError, DataError
from mixora.evaluate import Examples, generate
from mixora.loading import from_pretrained
from mixora.training.material import Material, batches_of_tasks, make_examples, read_material
from mixora.training.past import read_past
from mixora.training.progress import Progress
from mixora.training.run import measure
from mixora.training.run_config import DataSection, RunConfig, read_settings
from mixora.training.run_folder import RUN_FILE
from mixora.training.tasks import average, split_sites


@dataclass(frozen=True)
class Trained:
    """A trained adapter on its base, with the rows of its run."""

    model: PeftModel
    material: Material
    config: RunConfig
    progress: Progress

    def measure(self) -> dict[str, Any]:
        """Metrics on the held-out rows, and how many `rows` these are.

        Of several tasks their means, and each task's own below `tasks`.
        """
        examples = self._examples()
        found = measure(self.model, examples, self.config, self.progress, "trained")
        scores = {**average(found), "rows": sum(len(of_task.rows) for of_task in examples.values())}
        if self.config.data.tasks is None:
            return scores
        return {**scores, "tasks": {name: dict(of_task.metrics) for name, of_task in found.items()}}

    def inspect(self) -> list[dict[str, Any]]:
        """What the routers do with the held-out rows, see `mixora.inspect`; of several tasks each below `tasks`."""
        examples = self._examples()
        sites = self._inspect(examples, "inspecting")
        if self.config.data.tasks is None:
            return sites
        return split_sites(sites, {name: self._inspect({name: part}, name) for name, part in examples.items()})

    def _inspect(self, examples: Mapping[str, Examples], label: str) -> list[dict[str, Any]]:
        with self.progress.task(f"{label}, batches") as advance:
            return inspect(self.model, count(batches_of_tasks(examples, self.config), advance))

    def residual_energy(self) -> list[dict[str, Any]]:
        """How far experts behind modules are from full ones on the held-out rows; see `mixora.residual_energy`."""
        with self.progress.task("measuring, batches") as advance:
            return residual_energy(self.model, count(batches_of_tasks(self._examples(), self.config), advance))

    def _examples(self) -> dict[str, Examples]:
        return make_examples(self.material, self.config)

    def answer(self, prompts: list[str], max_new_tokens: int, sample: bool, compare: bool) -> list[dict[str, str]]:
        """The model's answer to each prompt, with the base's beside it if asked."""
        if self.material.task == "sequence-classification":
            raise DataError("this model classifies and cannot generate; valid: mixora evaluate")
        tokenizer, kind = self.material.tokenizer, self.material.kind
        ids = [
            render_prompt({"prompt": p}, "completion", tokenizer, self.config.data, model_kind=kind) for p in prompts
        ]
        settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": 8, "do_sample": sample}
        answers = [{"prompt": p} for p in prompts]
        if compare:
            with self.model.disable_adapter(), self.progress.task("asking the base") as advance:
                texts = generate(self.model, tokenizer, ids, advance=advance, **settings)
            for answer, text in zip(answers, texts, strict=True):
                answer["base"] = text
        with self.progress.task("answering") as advance:
            texts = generate(self.model, tokenizer, ids, advance=advance, **settings)
        for answer, text in zip(answers, texts, strict=True):
            answer["answer"] = text
        return answers


MAY_CHANGE = ("model", "data", "evaluate")
"""Sections of a run's settings that matter to its result too; the others say how it was made."""


def reopen(run: Path, changes: Mapping[str, Any], progress: Progress, tasks: Sequence[str] = ()) -> Trained:
    """The result of `mixora train`, with changes to its settings, and with some of its tasks only if named.

    Raises:
        CheckpointError: the folder is no such result.
        ConfigError: a task that the run does not have, or a change that has no effect once a run is trained.
    """
    if not (run / RUN_FILE).is_file() or not (run / "adapter").is_dir():
        raise CheckpointError(f"{run}: is not the folder of a finished run; valid: what `mixora train --out` wrote")
    config = _change(read_settings(run / RUN_FILE), changes)
    if tasks:
        config = config.model_copy(update={"data": _select(config.data, tasks)})
    progress.say(f"reading {run} and {config.model.base}")
    with progress.task("reading"):
        material = read_material(config, to_train=False, past=read_past(run))
        model = from_pretrained(material.model, run / "adapter")
    return Trained(model, material, config, progress)


def _change(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> RunConfig:
    for name in RunConfig.model_fields.keys() - set(MAY_CHANGE):
        if name in changes:
            raise ConfigError(
                f"{name}: has no effect on a run that is trained; valid: {', '.join(MAY_CHANGE)}, or a new run"
            )
    return parse(RunConfig, merge_trees(tree, changes))


def _select(data: DataSection, names: Sequence[str]) -> DataSection:
    known = data.tasks
    if known is None:
        raise ConfigError(f"task: got {names[0]!r}, but the run has one source and no tasks; valid: without task")
    for name in names:
        if name not in known:
            raise ConfigError(f"task: got {name!r}, which is no task of the run{did_you_mean(name, known)}")
    return data.model_copy(update={"tasks": {name: known[name] for name in names}})
