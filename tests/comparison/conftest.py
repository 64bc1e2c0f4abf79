"""A small comparison on a tiny model, and a launcher that trains nothing."""

import pytest
import yaml
from rich.console import Console

from mixora.comparison.execution import Outcome
from mixora.comparison.matrix import make_matrix
from mixora.comparison.settings import read_comparison
from mixora.diagnostics.record import RunRecord
from mixora.diagnostics.report import write_report
from mixora.training.progress import Progress
from mixora.training.run_config import read_run
from mixora.training.run_folder import open_folder
from tests.training.conftest import bases, data  # noqa: F401 - fixtures

SIRA = {"recipe": "sira", "num_experts": 4, "top_k": 2}
WORDS = {"base": "tiny", "data": "rows", "created": "", "command": "", "next_command": ""}


class Pretend:
    """Leaves a finished run's folder for each job. `made`: their names; runs named in `failing` fail.

    `measure` gives the metrics and the costs of a run by its name.
    """

    threads = 1

    def __init__(self, failing=(), measure=lambda name: ({"loss": 1.0}, {"train_seconds": 2.0})):
        self.failing, self.measure, self.made = failing, measure, []

    def launch(self, jobs):
        for job in jobs:
            if job.name in self.failing:
                yield Outcome(job.name, 0.0, "the disk is full")
                continue
            with open(job.settings) as file:
                config = read_run(yaml.safe_load(file))
            metrics, costs = self.measure(job.name)
            scores = {"before": {**metrics, "rows": 2}, "after": {**metrics, "rows": 2}, "environment": costs}
            counted = {"parameters": self.count(job.name)}
            record = RunRecord(title=job.name, recipe=config.adapter.recipe, **WORDS, **scores, **counted)
            write_report(record, open_folder(config, overwrite=True))
            self.made.append(job.name)
            yield Outcome(job.name, 1.0, None)

    def count(self, name):
        return {"total": 9000, "trainable": 700, "active": 300}


def quiet():
    return Progress(Console(quiet=True))


@pytest.fixture
def tree(bases, data, tmp_path):  # noqa: F811
    return {
        "model": {"base": str(bases / "llama")},
        "data": {"source": str(data / "commands")},
        "methods": ["lora", SIRA],
        "seeds": 1,
        "train": {"steps": 1, "batch_size": 4},
        "evaluate": {"limit": 2, "max_new_tokens": 1},
        "out": str(tmp_path / "out"),
    }


@pytest.fixture
def build(tree):
    """The matrix of the small comparison with changes."""
    return lambda **changes: make_matrix(read_comparison({**tree, **changes}))
