"""What libraries read when they are imported.

Without a GPU, Triton's interpreter computes kernel `triton`. No test asks the hub, which would be tried again.
"""

import os
import signal
from importlib import metadata
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from packaging.version import Version


def _triton_interprets() -> bool:
    """With NumPy 2.4 its interpreter cannot read sizes in version 3.6, and can in 3.9; nothing between was tried."""
    try:
        triton = Version(metadata.version("triton"))
    except metadata.PackageNotFoundError:
        return False
    return triton >= Version("3.9") or Version(metadata.version("numpy")) < Version("2.4")


os.environ.setdefault("HF_HUB_OFFLINE", "1")
# how long an example takes depends on what else the machine does
settings.register_profile("mixora", deadline=None, max_examples=60)
settings.load_profile("mixora")
# a shell has its jobs in the background ignore it, and tests send it
signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available() and _triton_interprets():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure(config):
    from tests import versions

    for line in versions.WARNINGS:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """Of all processes that share the tests."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def smollm_cache(shared_folder):
    """Where SmolLM2 lies unpacked, which takes 20 seconds: in `$MIXORA_CACHE` if the caller has one."""
    from mixora.bases import resolve_base

    held = os.environ.get("MIXORA_CACHE")
    cache = Path(held) if held else shared_folder / "unpacked"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MIXORA_CACHE", str(cache))
        with FileLock(shared_folder / "unpacking.lock"):
            resolve_base("smollm2-135m-instruct")
        yield cache


@pytest.fixture
def shared_data():
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("MIXORA_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no folder of real data sets at {folder}; MIXORA_SHARED_DATA can name it")
    return folder
