"""What a training step of each method of a table costs, measured apart from its trials: all methods take turns.

Time is that of the thread, memory what storages hold at once besides the weights, both beside the table's reference.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from benchmarks.measuring import Step, compare, compare_memory
from benchmarks.quality.results import RESULTS
from benchmarks.quality.table import Trial, read_table, tuning_trials
from benchmarks.recording import describe_run, write_results
from mixora.display.console import Console
from mixora.training.material import make_training_set, read_material
from mixora.training.progress import Progress
from mixora.training.run import build, make_trainer


def measure_costs(name: str, repeats: int = 15, folder: Path = RESULTS) -> Path:
    """Write a row for each method of the table, on its first data set; gives the file."""
    torch.set_num_threads(1)
    table = read_table(name)
    data = next(iter(table.data))
    with tempfile.TemporaryDirectory() as out:
        found = describe_run(sys.orig_argv[1:])
        steps = {method.name: _make_step(tuning_trials(name, data, method.name)[0], out) for method in table.methods}
        times, peaks = compare(steps, table.reference, repeats), compare_memory(steps, table.reference)
    rows = [{"method": method, **times[method], **peaks[method]} for method in steps]
    return write_results(f"costs-{name}", {**found, "data": data, "rows": rows}, folder)


def read_costs(name: str, folder: Path = RESULTS) -> Path | None:
    """The newest file of `measure_costs`, or None."""
    return max(folder.glob(f"costs-{name}-*.json"), default=None)


def _make_step(trial: Trial, out: str) -> Step:
    """One step of the trial's training, always on the same batch."""
    config = trial.config.model_copy(update={"out": out})
    material = read_material(config)
    rows = make_training_set(material, config)
    adapter, _ = build(material, rows, config, Progress(Console(quiet=True)))
    trainer: Any = make_trainer(get_peft_model(material.model, adapter), material, rows, config)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # which only `train` sets
    size = config.train.batch_size
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(size)])

    def step() -> None:
        trainer.training_step(trainer.model, dict(batch))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step
