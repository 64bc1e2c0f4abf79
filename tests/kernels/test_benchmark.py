"""The benchmark measures what it says: every kernel it can, on a load as named, and memory as it is."""

import pytest
import torch

from benchmarks.kernels import Case, list_changes, make_step, measure_growth, measure_speed
from benchmarks.measuring import LiveBytes
from mixora.kernels import KERNELS

# joint computes more than the experts, and these as stacked does
TIMED = [name for name, kernel in KERNELS.items() if not kernel.joins]
SMALL = Case(16, "float32", 8, tokens=12)


def test_every_kernel_is_timed_where_it_can_serve(capsys):
    rows = measure_speed([SMALL, Case(16, "float32", 6, tokens=12)], repeats=1)
    assert [set(row["ms"]) for row in rows] == [set(TIMED), set(TIMED) - {"grouped"}]
    assert [row["breadth"] for row in rows] == [32, 24]
    assert "R/K     32" in capsys.readouterr().out


def test_growth_is_a_ratio_of_two_cases():
    rows = measure_growth({"tokens": (SMALL, Case(16, "float32", 8, tokens=1200))}, repeats=1)
    assert [row["kernel"] for row in rows] == TIMED
    for row in rows:
        assert row["memory"] == pytest.approx(row["mebibytes"]["after"] / row["mebibytes"]["before"], abs=0.01)
        assert row["memory"] > 1


def test_the_kernels_of_a_case_compute_the_same():
    for case in (SMALL, Case(16, "float32", 8, tokens=12, skewed=True)):
        found = [make_step(name, case)() for name in KERNELS]
        for other in found[1:]:
            for got, want in zip(other, found[0], strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_the_changes_are_the_ones_named():
    changes = list_changes(4096)
    assert [after.experts for _, after in changes.values()] == [64, 8, 8]
    assert changes["tokens 256 to 4096"][1].tokens == 4096
    assert changes["one expert gets all"][1].skewed


def test_live_bytes_are_those_of_the_storages_alive():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first.view(10, 100)
        del first
        assert live.now == 4000
        del view
        second = torch.zeros(500) + 1
        assert live.now == 2000
    assert live.peak == 4000
    del second
