"""A whole run of `pesc` on each kind of model: trained, read back, inspected, asked."""

import json

import pytest
from typer.testing import CliRunner

from mixora.cli import app

SMALL = ["adapter.num_experts=4", "adapter.rank=4", "train.steps=3", "train.batch_size=4", "evaluate.limit=4"]


def call(*words):
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("kind", "rows"), [("llama", "commands"), ("t5", "commands"), ("bert", "classes")])
def test_a_run(bases, data, tmp_path, kind, rows):
    out = tmp_path / "out"
    words = ["--recipe", "pesc", "--model", bases / kind, "--data", data / rows, "--out", out, "--json"]
    record = json.loads(call("train", *words, *SMALL, "evaluate.max_new_tokens=3"))
    assert record["reloaded"] == {name: record["after"][name] for name in record["reloaded"]}
    assert len(record["history"]) == 3
    sites = json.loads(call("inspect", out, "--json"))
    assert sum(len(site["load"]) == 4 for site in sites) == (4 if kind == "t5" else 2)
    found = json.loads(call("inspect", out, "--residual", "--json"))
    assert [site["ranks"] for site in found] == [[4] * 4] * (4 if kind == "t5" else 2)
    assert all(0 <= share < 1 - 4 / 32 for site in found for share in site["beyond_rank"] if share is not None)
    told = call("inspect", out, "--residual")
    assert "beyond the rank per expert" in told and f"{len(found)} sites" in told
    if kind != "bert":
        assert json.loads(call("generate", out, "--prompt", "lamp hall", "--max-new-tokens", 3, "--json"))
