"""Without a GPU, Triton's interpreter computes kernel `triton`: it has to be asked for before Triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    from tests import versions

    for line in versions.WARNINGS:
        config.addinivalue_line("filterwarnings", line)
