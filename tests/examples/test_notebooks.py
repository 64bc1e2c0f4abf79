"""The cells of the notebooks run in order, over tiny bases, for two steps; `make notebooks` runs them as they are."""

import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import mixora.bases
from tests.characters import build_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
TOKENIZER = build_tokenizer()


def cells_of(path):
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def load_tiny(name, task="causal-lm", num_labels=None):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(TOKENIZER), "max_position_embeddings": 256}
    if task == "causal-lm":
        model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    else:
        model = BertForSequenceClassification(BertConfig(**sizes, num_labels=num_labels)).eval()
    model.name_or_path = model.config._name_or_path = name
    return model, TOKENIZER


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cells_run(path, tmp_path, monkeypatch, capsys):
    here = tmp_path / "examples" / "notebooks"
    here.mkdir(parents=True)
    (here.parent / "quickstart").symlink_to(FOLDER.parent / "quickstart")
    monkeypatch.chdir(here)
    monkeypatch.setattr(mixora.bases, "load_base", load_tiny)
    names = {}
    for cell in cells_of(path):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"]).replace("STEPS = ", "STEPS = 2  # ")
            exec(compile(source, f"{path.name}, {cell['id']}", "exec"), names)
    out = capsys.readouterr().out
    assert names["trainer"].state.global_step == 2
    if path.stem == "fine_tune":
        assert "equal to the base: True" in out and "equal after loading: True" in out
    else:
        assert "LORA" in out
        torch.testing.assert_close(names["theirs"], names["ours"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_each_says_what_it_shows(path):
    cells = cells_of(path)
    assert cells[0]["cell_type"] == "markdown"
    assert max(len(cell["source"]) for cell in cells) <= 25
    assert sum(cell["cell_type"] == "markdown" for cell in cells) >= 6
