"""Deterministic mode: the same run twice gives the same bits, and an operator that cannot do so is an error."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mixora.errors import TrainingError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
DETERMINISTIC_WORKSPACE = ":4096:8"
_REFUSAL = re.compile(r"(\S+) does not have a deterministic implementation")
_WORKSPACE_REFUSAL = re.compile(r"CuBLAS .*CUBLAS_WORKSPACE_CONFIG", re.DOTALL)


@contextmanager
def deterministic(is_on: bool = True) -> Iterator[None]:
    """Let PyTorch use deterministic operators alone while open; what was set before is set again afterwards.

    On a GPU, cuBLAS reads its workspace from the environment when it starts: it is set here where nobody has set it.
    Raises `TrainingError` for an operator without a deterministic version, and where cuBLAS started before with another
    workspace.
    """
    if not is_on:
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, workspace = cudnn.benchmark, os.environ.get(WORKSPACE)
    os.environ.setdefault(WORKSPACE, DETERMINISTIC_WORKSPACE)
    torch.use_deterministic_algorithms(True)
    cudnn.benchmark = False
    try:
        yield
    except RuntimeError as error:
        refusal = _explain(str(error))
        if refusal is None:
            raise
        raise TrainingError(refusal) from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.benchmark = benchmark
        if workspace is None:
            del os.environ[WORKSPACE]


def _explain(text: str) -> str | None:
    if (found := _REFUSAL.search(text)) is not None:
        return (
            f"train.deterministic: the operator {found[1]} has no deterministic version on this device; valid: "
            "train.deterministic=false, a model or setting without that operator, or another device"
        )
    if _WORKSPACE_REFUSAL.search(text):
        return (
            f"train.deterministic: cuBLAS has started with another workspace; valid: {WORKSPACE}="
            f"{DETERMINISTIC_WORKSPACE} in the environment before Python starts"
        )
    return None
