"""What is counted for a roofline, against sums by hand, and what follows from it."""

import pytest

from benchmarks.gpu import llama, roofline
from benchmarks.gpu.roofline import Llama, Mixture, Part, Peak

SMALL = Llama(width=4, inner=6, layers=3, heads=2, groups=1, vocabulary=10, tied=True)
PEAK = Peak("slow", flops=1000, bandwidth=100)


def test_a_product():
    """[3, 5] times [5, 2]: 2 * 3 * 2 * 5 operations on 15 + 10 + 6 numbers of two bytes."""
    assert roofline.product(3, 2, 5) == Part(60, 62)


def test_a_part_takes_the_longer_of_arithmetic_and_traffic():
    assert Part(2000, 100).bound(PEAK) == 2
    assert Part(2000, 300).bound(PEAK) == 3


def test_a_linear_with_experts():
    """7 tokens, 4 in, 6 out, 3 columns, 2 experts: A with the router and B thrice each, the frozen weight twice."""
    assert sum(part.flops for part in roofline.frozen(7, 4, 6)) == 2 * (2 * 7 * 4 * 6)
    found = roofline.experts(7, 4, 6, Mixture(columns=3, experts=2))
    assert sum(part.flops for part in found) == 3 * (2 * 7 * 4 * (3 + 2)) + 3 * (2 * 7 * 6 * 3)


def test_a_model_without_experts_counts_four_operations_per_weight_and_token():
    """Weights of seven linears and the head, each multiplied in forward and for the gradient of the input."""
    weights = 2 * 4 * 4 + 2 * 4 * 2 + 2 * 4 * 6 + 6 * 4
    assert [i * o for i, o in SMALL.linears] == [16, 8, 8, 16, 24, 24, 24] and sum(
        [16, 8, 8, 16, 24, 24, 24]
    ) == weights
    parts = roofline.training_step(SMALL, 3, 8, 4, Mixture(0, 0))
    of_attention = 3 * 3.5 * (2 * 8 * 4 * 4)
    assert sum(part.flops for part in parts) == 4 * 8 * (3 * weights + 4 * 10) + of_attention


def test_decoding_reads_every_weight():
    parts = roofline.decoding_step(SMALL, 3, 1, 0, Mixture(0, 0))
    weights = 3 * 120 + 40
    activations = 3 * sum(i + o for i, o in SMALL.linears) + 3 * 2 * sum(i for i, _ in SMALL.linears) * 0
    assert sum(part.bytes for part in parts) >= 2 * (weights + activations)
    assert sum(part.flops for part in parts) == 2 * weights


def test_the_shapes_have_as_many_weights_as_their_models():
    """Llama 3.2 1B has 1.236e9 parameters, Llama 3.1 8B 8.030e9; norms are not counted here."""
    for shape, total in ((llama.ONE_B, 1.236e9), (llama.EIGHT_B, 8.030e9)):
        tables = shape.vocabulary * shape.width * (1 if shape.tied else 2)
        assert shape.layers * sum(i * o for i, o in shape.linears) + tables == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "found"),
    [("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200"), ("Tesla T4", None)],
)
def test_the_peak_follows_the_name_of_the_device(name, found):
    peak = roofline.find_peak(name)
    assert (peak.name if peak else None) == found


def test_a_summary_has_the_bound_or_says_why_not():
    parts = [Part(2000, 100), Part(1000, 200)]
    assert roofline.summarise(parts, PEAK) == {"teraflops": 3e-9, "gigabytes": 3e-7, "bound_ms": 4000, "peak": "slow"}
    assert "not in the table" in roofline.summarise(parts, None)["bound_ms"]
    rated = llama.rate([{"variant": "ours", "ms": 8000}], parts, PEAK)
    assert rated["rows"] == [{"variant": "ours", "ms": 8000, "roofline_fraction": 0.5}]


def test_a_line_through_two_measurements():
    rows = {
        2: {"dtype": "d", "variant": "v", "ms": 10.0, "mebibytes": 5},
        4: {"dtype": "d", "ms": 16.0, "mebibytes": 7},
    }
    rows[4]["variant"] = "v"
    assert llama.extrapolate(rows, 32) == {"dtype": "d", "variant": "v", "ms": 100.0, "mebibytes": 35}
