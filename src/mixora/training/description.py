"""What the record of a run tells, besides its scores."""

import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from peft import PeftModel

from mixora.data import conversation_of
from mixora.diagnostics.examination import examine
from mixora.diagnostics.measure import load_by_group
from mixora.evaluate import Evaluation, Examples
from mixora.host.world import count_processes
from mixora.planning.plan import Plan
from mixora.training.material import Material, TrainingSet, batches_of, batches_of_tasks
from mixora.training.progress import Progress
from mixora.training.run_config import RunConfig
from mixora.training.tasks import average
from mixora.tuner import MixoraConfig

ROWS_PER_GROUP = 8


def describe_run(config: RunConfig, adapter: MixoraConfig, material: Material) -> dict[str, Any]:
    """Its names, those of its classes, and the commands that made it and that make the next one."""
    return {
        "title": config.title or f"{adapter.recipe} on {', '.join(config.data.by_task())}",
        "recipe": str(adapter.recipe),
        "base": config.model.base,
        "data": config.data.origin,
        "labels": None if material.labels is None else list(material.labels),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["mixora", *sys.argv[1:]]),
        "next_command": f"mixora train --recipe {adapter.recipe} --model YOUR_MODEL --data YOUR_DATA --out runs/yours",
    }


def describe_scores(
    rows: TrainingSet, examples: Mapping[str, Examples], measured: Mapping[str, Mapping[str, Evaluation]]
) -> dict[str, Any]:
    """The means over tasks at each time; and of each of several tasks what was drawn of it, and its own scores."""
    held_out = {name: len(of_task.rows) for name, of_task in examples.items()}
    means = {when: average(evaluations) for when, evaluations in measured.items()}
    for when in ("before", "after"):
        means[when]["rows"] = sum(held_out.values())
    tasks = {
        name: {
            **drawn,
            "held_out": held_out[name],
            **{when: dict(evaluations[name].metrics) for when, evaluations in measured.items()},
        }
        for name, drawn in rows.tasks.items()
    }
    return {**means, "tasks": tasks}


def describe_model(
    model: PeftModel,
    material: Material,
    table: Plan,
    examples: Mapping[str, Examples],
    config: RunConfig,
    progress: Progress,
) -> dict[str, Any]:
    """Plan, parameters, and what the trained routers do with the held-out rows."""
    trainable, total = model.get_nb_trainable_parameters()
    outside = trainable - table.parameters  # a new classification head
    with progress.task("inspecting, batches") as advance:
        found = examine(model, batches_of_tasks(examples, config), material.tokenizer, advance)
    return {
        "plan": table.rows(full=True),
        "parameters": {"total": total, "trainable": trainable, "active": table.active_parameters + outside},
        **vars(found),
        "load": _load_by_group(model, examples, config),
    }


def _load_by_group(model: Any, examples: Mapping[str, Examples], config: RunConfig) -> dict[str, Any] | None:
    field = config.data.group_by or ("domain" if config.data.tasks is None else "task")
    groups: dict[str, list[Mapping[str, torch.Tensor]]] = {}
    for of_task in examples.values():
        numbers: dict[str, list[int]] = {}
        for number, row in enumerate(of_task.rows):
            if field in row:
                numbers.setdefault(str(row[field]), []).append(number)
        for name, rows in numbers.items():
            groups.setdefault(name, []).extend(batches_of(of_task, config, rows[:ROWS_PER_GROUP]))
    if not groups:
        return None
    load = load_by_group(model, dict(sorted(groups.items())))
    return load if load["sites"] else None


def list_generations(
    examples: Mapping[str, Examples], measured: Mapping[str, Mapping[str, Evaluation]], count: int
) -> list[dict[str, str]]:
    """The first `count` answers of each task, before and after, beside what was expected."""
    before, after, said = measured["before"], measured["after"], []
    for name, of_task in examples.items():
        # metrics such as the loss ask for no answers
        if of_task.form not in ("completion", "messages") or not after[name].predictions:
            continue
        answers = zip(of_task.rows, before[name].predictions, after[name].predictions, strict=True)
        for row, first, last in list(answers)[:count]:
            # by the form: rows carry other fields along, which may have these names
            prompt, expected = (m["content"] for m in conversation_of(row, of_task.form, answered=True)[-2:])
            said.append({"prompt": prompt, "expected": expected, "before": str(first), "after": str(last)})
    return said


def describe_environment(config: RunConfig, seconds: float) -> dict[str, Any]:
    """Versions and the machine."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = ("mixora", "torch", "transformers", "peft")
    return {
        **{name: version(name) for name in packages},
        "device": device,
        "dtype": config.model.dtype,
        "seed": config.train.seed,
        "processes": count_processes(),
        "minutes": round(seconds / 60, 2),
    }
