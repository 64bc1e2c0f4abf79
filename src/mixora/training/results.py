"""What a run leaves behind: the summary, and the trained model opened again."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from mixora.config import did_you_mean, merge_trees, parse
from mixora.data import render_prompt
from mixora.diagnostics.measure import inspect
from mixora.diagnostics.page import format_value
from mixora.diagnostics.record import RunRecord
from mixora.diagnostics.report import summarise
from mixora.diagnostics.residual import residual_energy
from mixora.diagnostics.verdict import judge_routers
from mixora.errors import CheckpointError, ConfigError, DataError
from mixora.evaluate import Examples, generate
from mixora.loading import from_pretrained
from mixora.plan import common_prefix
from mixora.stages import count
from mixora.training.material import Material, batches_of_tasks, make_examples, read_material
from mixora.training.progress import Progress
from mixora.training.run import measure
from mixora.training.run_config import DataSection, RunConfig, read_settings
from mixora.training.run_folder import RUN_FILE
from mixora.training.tasks import average, scores_table, split_sites


def summarise_run(record: RunRecord, out: Path) -> Iterator[RenderableType]:
    """The end of a run, for a terminal."""
    table = Table(
        "metric", "before", "after", "read back", title=f"{record.title}: {record.after['rows']:.0f} held-out rows"
    )
    for name in record.before:
        if name != "rows":
            read_back = (record.reloaded or {}).get(name)
            table.add_row(
                name.replace("_", " "),
                format_value(record.before[name], name),
                Text(format_value(record.after[name], name), style="green"),
                format_value(read_back, name),
            )
    yield table
    if record.tasks:
        columns = {"before": "before", "after": "after", "read back": "reloaded"}
        scores = {
            name: {label: task[column] for label, column in columns.items()} for name, task in record.tasks.items()
        }
        yield scores_table("each task; the scores above are their means", scores)
    for said in record.generations:
        block = Table.grid(padding=(0, 1))
        for name, text in said.items():
            block.add_row(Text(f"{name:>9}", style="bold"), text)
        yield block
        yield ""
    yield summarise(record)
    for finding in judge_routers(record):
        yield Text(f"{finding.kind}: {finding.text}")
    yield f"adapter  {out / 'adapter'}\nreport   {out / 'report.html'}\nyours    {record.next_command}"


@dataclass(frozen=True)
class Trained:
    """A trained adapter on its base, with the rows of its run."""

    model: PeftModel
    material: Material
    config: RunConfig
    progress: Progress

    def measure(self) -> dict[str, Any]:
        """Metrics on the held-out rows; of several tasks their means, and each task's own below `tasks`."""
        found = measure(self.model, self._examples(), self.config, self.progress, "trained")
        if self.config.data.tasks is None:
            return dict(average(found))
        return {**average(found), "tasks": {name: dict(of_task.metrics) for name, of_task in found.items()}}

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


def reopen(run: Path, changes: Mapping[str, Any], progress: Progress, tasks: Sequence[str] = ()) -> Trained:
    """The result of `mixora train`, with changes to its settings, and with some of its tasks only if named.

    Raises:
        CheckpointError: the folder is no such result.
        ConfigError: a task that the run does not have.
    """
    if not (run / RUN_FILE).is_file() or not (run / "adapter").is_dir():
        raise CheckpointError(f"{run}: is not the folder of a finished run; valid: what `mixora train --out` wrote")
    config = parse(RunConfig, merge_trees(read_settings(run / RUN_FILE), changes))
    if tasks:
        config = config.model_copy(update={"data": _select(config.data, tasks)})
    progress.say(f"reading {run} and {config.model.base}")
    with progress.task("reading"):
        material = read_material(config, to_train=False)
        model = from_pretrained(material.model, run / "adapter")
    return Trained(model, material, config, progress)


def _select(data: DataSection, names: Sequence[str]) -> DataSection:
    known = data.tasks
    if known is None:
        raise ConfigError(f"task: got {names[0]!r}, but the run has one source and no tasks; valid: without task")
    for name in names:
        if name not in known:
            raise ConfigError(f"task: got {name!r}, which is no task of the run{did_you_mean(name, known)}")
    return data.model_copy(update={"tasks": {name: known[name] for name in names}})


def metrics_table(title: str, metrics: Mapping[str, Any]) -> Table:
    """What `Trained.measure` found, for a terminal."""
    means = {name: value for name, value in metrics.items() if name != "tasks"}
    if "tasks" in metrics:
        each = {name: {"value": scores} for name, scores in metrics["tasks"].items()}
        return scores_table(title, {**each, "mean over tasks": {"value": means}})
    table = Table("metric", "value", title=title)
    for name, value in means.items():
        table.add_row(name.replace("_", " "), f"{value:.4f}")
    return table


def routing_table(sites: list[dict[str, Any]]) -> Table:
    """What `mixora.inspect` found, for a terminal."""
    columns = ("load per expert, %", "per token", "entropy", "dropped", "dead")
    return _site_table(sites, columns, _routing_cells)


def _routing_cells(site: dict[str, Any]) -> tuple[str, ...]:
    load = " ".join(f"{100 * share:.0f}" for share in site["load"])
    entropy = "-" if site["entropy"] is None else f"{site['entropy']:.3f}"
    dead = ", ".join(map(str, site["dead_experts"])) or "none"
    return load, f"{site['experts_per_token']:.2f}", entropy, f"{site['dropped_share']:.1%}", dead


def residual_table(sites: list[dict[str, Any]]) -> Table:
    """What `mixora.residual_energy` found, for a terminal."""
    return _site_table(sites, ("beyond the rank per expert, %", "tokens", "rank"), _residual_cells)


def _residual_cells(site: dict[str, Any]) -> tuple[str, ...]:
    beyond = " ".join("-" if share is None else f"{100 * share:.1f}" for share in site["beyond_rank"])
    rank = "-".join(map(str, sorted({min(site["ranks"]), max(site["ranks"])})))
    return beyond, " ".join(map(str, site["tokens"])), rank


def _site_table(
    sites: list[dict[str, Any]], columns: Sequence[str], cells: Callable[[dict[str, Any]], tuple[str, ...]]
) -> Table:
    """A row of cells per site; the first column is text, the others are numbers."""
    prefix = common_prefix([site["path"] for site in sites])
    title = f"{len(sites)} sites" + (f" in {prefix}" if prefix else "")
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("site", overflow="fold")
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    for site in sites:
        table.add_row(site["path"].removeprefix(prefix + "."), *cells(site))
        for name, of_task in site.get("tasks", {}).items():
            table.add_row(f"  {name}", *cells(of_task))
    return table
