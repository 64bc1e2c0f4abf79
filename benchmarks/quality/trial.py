"""One trial: train, measure, and tell what came out as plain numbers. Writes nothing that stays."""

import tempfile
import time
from datetime import date
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor

from benchmarks.quality.specialisation import count_by_row, judge_specialisation, measure_information
from benchmarks.quality.table import Trial, Way
from mixora.display.console import Console
from mixora.errors import NonFiniteError
from mixora.evaluate import Examples, evaluate
from mixora.merging.soup import cook
from mixora.mixture import mixtures_of
from mixora.routing.draws import serving
from mixora.training.material import batches_of, make_examples, make_training_set, read_material
from mixora.training.progress import Progress
from mixora.training.run import build, make_trainer
from mixora.training.run_config import RunConfig
from mixora.tuner.serving import served_by


def run_trial(trial: Trial) -> dict[str, Any]:
    """Metrics by way of serving, seconds and tokens of training, parameters.

    A training whose numbers went wrong gives `failed`, with the reason, in place of all that.
    """
    began = time.perf_counter()
    try:
        found = _run(trial)
    except NonFiniteError as error:
        found = {"failed": str(error)}
    return {**found, "total_seconds": round(time.perf_counter() - began, 1), "date": str(date.today())}


def _run(trial: Trial) -> dict[str, Any]:
    torch.set_num_threads(1)
    progress = Progress(Console(quiet=True))
    with tempfile.TemporaryDirectory() as folder:
        config = trial.config.model_copy(update={"out": folder})
        torch.manual_seed(config.train.seed)
        material = read_material(config)
        rows = make_training_set(material, config)
        adapter, plan = build(material, rows, config, progress)
        examples = make_examples(material, config)
        torch.manual_seed(config.train.seed)
        model = get_peft_model(material.model, adapter)
        untrained = _count_choices(model, examples, config) if trial.group_by else {}
        trainer = make_trainer(model, material, rows, config)
        began = time.perf_counter(), time.process_time()
        trainer.train()
        seconds, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        found: dict[str, Any] = {
            "metrics": {how: _measure(model, examples, config, how) for how in trial.served_by},
            **({} if trial.also is None else {"also": _measure_split(model, config, trial.also)}),
            "trainable": plan.parameters,
            "active": plan.active_parameters,
            "tokens": trainer.state.num_input_tokens_seen,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(busy, 2),
        }
        if trial.group_by:
            groups = _read_groups(examples, trial.group_by)
            trained = judge_specialisation(_count_choices(model, examples, config), groups)
            found["specialisation"] = {**trained, "untrained": measure_information(untrained, groups)}
    return found


def _measure(model: Any, examples: dict[str, Examples], config: RunConfig, how: Way) -> dict[str, float]:
    """The metrics on the held-out rows."""
    (of_data,) = examples.values()
    with serving(members=_choose_experts(model, config)) if how == "soup" else served_by(model, how):
        return evaluate(model, of_data, config.evaluate).metrics


def _measure_split(model: Any, config: RunConfig, split: str) -> dict[str, float]:
    """The metrics on the rows of another split."""
    return _measure(model, _read_split(config, split), config, "merged")


def _read_split(config: RunConfig, split: str) -> dict[str, Examples]:
    data = config.data.model_copy(update={"evaluation_split": split})
    config = config.model_copy(update={"data": data})
    return make_examples(read_material(config, to_train=False, with_weights=False), config)


def _choose_experts(model: Any, config: RunConfig) -> tuple[int, ...]:
    """Those that lower the loss on the validation rows."""
    (held_out,) = _read_split(config, "validation").values()
    batches = batches_of(held_out, config, range(len(held_out.rows)))
    return cook(model, list(mixtures_of(model)), model.active_adapter, batches, lambda done, total: None).members


def _count_choices(model: Any, examples: dict[str, Examples], config: RunConfig) -> dict[str, Tensor]:
    """How often the held-out rows chose each expert, `[rows, experts]`, by routed site."""
    (of_data,) = examples.values()
    return count_by_row(model, batches_of(of_data, config, range(len(of_data.rows))))


def _read_groups(examples: dict[str, Examples], field: str) -> list[str]:
    (of_data,) = examples.values()
    return [str(row[field]) for row in of_data.rows]
