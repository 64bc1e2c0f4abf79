"""Exports to folders by the command: what a run's card tells, the copy of an adapter, and options without effect."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from mixora.bases import load_base
from mixora.cards import Card
from mixora.cli import app
from mixora.loading import from_pretrained
from mixora.standalone import writing
from tests.characters import save_bases
from tests.models import token_ids
from tests.training.conftest import command_rows

IDS = token_ids(1, 6)
SMALL = ["adapter.num_experts=2", "adapter.top_k=1", "adapter.rank=2", "train.steps=2", "train.batch_size=4"]


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def spoken(result):
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of `pesc`."""
    root = tmp_path_factory.mktemp("export")
    save_bases(root)
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in command_rows(12)))
    words = ["--model", root / "llama", "--data", root / "rows.jsonl", "--out", root / "run", *SMALL]
    done = call("train", "--recipe", "pesc", *words, "evaluate.limit=2", "evaluate.max_new_tokens=2")
    assert done.exit_code == 0, done.output
    return root / "run"


@pytest.fixture
def cards(monkeypatch):
    """The texts of all cards that are written."""
    texts, render = [], Card.render

    def keep(card, folder):
        texts.append(render(card, folder))
        return texts[-1]

    monkeypatch.setattr(Card, "render", keep)
    return texts


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_the_adapter_of_a_run_comes_with_a_card(run):
    card = ModelCard.load(run / "adapter" / "README.md")
    record = json.loads((run / "record.json").read_text())
    scores = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert scores == {name: value for name, value in record["after"].items() if name != "rows"}
    assert card.data.tags == ["mixora", "pesc"] and card.data.library_name == "peft"
    for part in ("## The mixture", "## Training", "`rows.jsonl`", "| `steps` | `2` |", "arXiv 2401.02731"):
        assert part in card.text
    names = {}
    exec(card.text.split("```python\n")[1].split("```")[0], names)
    expected = logits(from_pretrained(load_base(run.parent / "llama")[0], run / "adapter"))
    assert torch.equal(logits(names["model"]), expected)


def test_a_copy_of_the_adapter_with_another_name_of_the_base(run, tmp_path):
    (tmp_path / "base").symlink_to(run.parent / "llama")
    words = ["export", run, "--to", "adapter", "--out", tmp_path / "out", "--base-id", str(tmp_path / "base")]
    assert json.loads(call(*words, "--json").output) == {"form": "adapter", "out": str(tmp_path / "out")}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert names == {".mixora", "README.md", "tokenizer.json", "tokenizer_config.json"} | adapter
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    expected = logits(from_pretrained(load_base(run.parent / "llama")[0], run / "adapter"))
    assert torch.equal(logits(model), expected)
    again = call(*words)
    assert again.exit_code == 2 and "is not empty" in spoken(again)


def test_a_standalone_checkpoint_of_a_run(run, tmp_path, cards):
    words = ["export", run, "--to", "standalone", "--out", tmp_path / "out", "--licence", "apache-2.0"]
    rehearsed = json.loads(call(*words, "--dry-run", "--json").output)
    assert set(rehearsed["sites"].values()) == {"as it is"} and not (tmp_path / "out").exists()
    found = json.loads(call(*words, "--json").output)
    assert found["sites"] == len(rehearsed["sites"]) and found["difference"] < 1e-5
    again = writing._read_back(tmp_path / "out", torch.float32)
    expected = logits(from_pretrained(load_base(run.parent / "llama")[0], run / "adapter"))
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "transformers")
    assert "the\nlargest difference was" in card.text and "trust_remote_code=True" in card.text
    assert len(cards) == 1 and "## Results" in cards[0]


def test_a_lora_of_a_run_tells_what_its_run_measured(run, tmp_path, cards):
    lora = shutil.copytree(run, tmp_path / "lora")
    words = ["--recipe", "lora", "--model", run.parent / "llama", "--data", run.parent / "rows.jsonl"]
    small = ["adapter.rank=2", *SMALL[3:], "evaluate.limit=2", "evaluate.max_new_tokens=2"]
    assert call("train", *words, "--out", lora, "--overwrite", *small).exit_code == 0
    cards.clear()
    assert call("export", lora, "--to", "dense", "--out", tmp_path / "dense").exit_code == 0
    assert len(cards) == 1
    card = ModelCard.load(tmp_path / "dense" / "README.md")
    assert card.data.eval_results and "## How it was merged" in card.text and "## Results" in card.text
    expected = logits(from_pretrained(load_base(run.parent / "llama")[0], lora / "adapter"))
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_fitted_lora_says_whose_the_scores_are(run, tmp_path):
    words = ["--recipe", "sira", "--model", run.parent / "llama", "--data", run.parent / "rows.jsonl"]
    small = [*SMALL, "evaluate.limit=2", "evaluate.max_new_tokens=2"]
    assert call("train", *words, "--out", tmp_path / "sira", *small).exit_code == 0
    export = ["export", tmp_path / "sira", "--to", "peft-lora", "--out", tmp_path / "out"]
    assert call(*export, "--approximate").exit_code == 0
    card = ModelCard.load(tmp_path / "out" / "README.md")
    results = card.text.split("## Results")[1].split("## How it was merged")[0]
    assert "They are those of the mixture before it was merged." in results and card.data.eval_results is None
    assert "Measured over" in card.text and "Nothing else was measured" not in card.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "gguf", "--out", "x"], "to: got 'gguf' (known: adapter, averaged, dense, hub"),
        (["--to", "standalone"], "out: is required; valid: --out DIR"),
        (["--to", "dense", "--out", "x", "--repo", "a/b"], "repo: is for the hub; valid: with --to hub"),
        (["--to", "dense", "--out", "x", "--private"], "private: is for the hub"),
        (["--to", "standalone", "--out", "x", "--uniform-rank"], "uniform_rank: nothing is merged; valid: with peft-l"),
        (["--to", "adapter", "--out", "x", "--rank", 0], "rank: nothing is merged"),
        (["--to", "adapter", "--out", "x", "model.base=7"], "model.base: got 7"),
        (["--to", "peft-lora", "--out", "x"], "with a non-linearity inside"),
        (["--to", "standalone", "--out", "x", "data.source=y"], "data: an exact export looks at no rows"),
        (["--to", "adapter", "--out", "x", "--licence", "Mine!"], "licence: got 'Mine!'"),
        (["--to", "averaged", "--out", "x"], "with a non-linearity inside"),
    ],
)
def test_mistakes(words, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("export", run, *words)
    assert result.exit_code == 2 and message in spoken(result)
    assert not (tmp_path / "x").exists()
