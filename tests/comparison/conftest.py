"""A small comparison on a tiny model, and launchers that need no processes."""

import pytest
import yaml
from rich.console import Console

from mixora.comparison.execution import Outcome
from mixora.comparison.matrix import make_matrix
from mixora.comparison.settings import read_comparison
from mixora.training.progress import Progress
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.conftest import bases, data  # noqa: F401 - fixtures

SIRA = {"recipe": "sira", "num_experts": 4, "top_k": 2}


class InProcess:
    """Makes runs here, one after the other; `made`: their names. Runs named in `failing` fail."""

    threads = 1

    def __init__(self, failing=()):
        self.failing, self.made = failing, []

    def launch(self, jobs):
        for job in jobs:
            if job.name in self.failing:
                yield Outcome(job.name, 0.0, "the disk is full")
                continue
            with open(job.settings) as file:
                fit(read_run(yaml.safe_load(file)), quiet(), overwrite=True)
            self.made.append(job.name)
            yield Outcome(job.name, 1.0, None)


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
