"""What libraries read when they are imported.

Without a GPU, Triton's interpreter computes kernel `triton`. No test asks the hub, which would be tried again.
"""

import os

import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# how long an example takes depends on what else the machine does
settings.register_profile("mixora", deadline=None, max_examples=60)
settings.load_profile("mixora")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    from tests import versions

    for line in versions.WARNINGS:
        config.addinivalue_line("filterwarnings", line)
