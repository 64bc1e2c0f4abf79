"""The script for a GPU: all of it runs on a CPU, nothing where CUDA is missing, the rest where a part fails."""

import json
import time

import pytest
import torch

from benchmarks.gpu import run
from mixora.contracts import Shape
from mixora.kernels import KERNELS
from mixora.losses import fused as fused_loss


def test_every_section_runs_on_a_cpu(tmp_path):
    before = fused_loss.CHUNK
    found = run.run_all(run.make_tiny("cpu"), tmp_path / "found.json")
    assert json.loads((tmp_path / "found.json").read_text()) == found
    sections = found["sections"]
    assert list(sections) == [name for name, _, _ in run.SECTIONS]
    assert [name for name, section in sections.items() if "error" in section] == []
    parity = sections["kernel parity"]["found"] + sections["joint parity"]["found"]
    able = {name for name, kernel in KERNELS.items() if kernel.objection(Shape(16, 16, (8,)), torch.float32) is None}
    assert {row["kernel"] for row in parity} == able
    assert all(row["passed"] for row in parity)
    assert {row["passes"] for row in sections["fused loss"]["found"]} == {1, 2}
    assert before == fused_loss.CHUNK


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the lack of CUDA")
def test_without_cuda_every_section_says_why_it_is_skipped(tmp_path):
    found = run.run_all(run.make_tiny("cuda"), tmp_path / "found.json")
    assert all(section == {"skipped": "no CUDA device"} for section in found["sections"].values())


def test_an_error_and_an_overrun_budget_are_recorded(tmp_path, monkeypatch):
    def fail(sizes):
        raise ValueError("no")

    sections = [("fails", fail, 5), ("hangs", lambda sizes: time.sleep(5), 1), ("works", lambda sizes: 3, 5)]
    monkeypatch.setattr(run, "SECTIONS", sections)
    found = run.run_all(run.make_tiny("cpu"), tmp_path / "found.json")["sections"]
    assert found["fails"]["error"] == "ValueError: no"
    assert found["hangs"]["error"] == "TimeoutError: took more than its 1 s"
    assert found["works"]["found"] == 3
    json.loads((tmp_path / "found.json").read_text())


def test_the_budgets_fit_into_ten_minutes():
    assert sum(budget for _, _, budget in run.SECTIONS) <= 600
