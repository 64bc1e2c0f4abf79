"""Adapters that bring new tokens: embeddings lie in their file, as PEFT saves them, and stay in exports."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import mixora
from mixora.answering.roster import find_source, load_roster
from mixora.bases import is_resized, load_base
from mixora.cli import app
from mixora.loading import from_pretrained
from mixora.standalone import writing
from tests.characters import save_bases
from tests.models import adapt, token_ids

IDS = torch.cat([token_ids(1, 5), torch.tensor([[100]])], dim=1)
NEW = "<call>"


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of an adapter with its tokenizer, and the logits of the model that it was saved from."""
    root = tmp_path_factory.mktemp("tokens")
    save_bases(root)
    base, tokenizer = load_base(root / "llama")
    assert not is_resized(base)
    assert tokenizer.add_tokens([NEW]) == 1
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    assert is_resized(base) and len(tokenizer) == 101
    model = adapt(base, mixora.recipe("lora", rank=2, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(root / "adapter", save_embedding_layers=True)
    tokenizer.save_pretrained(root / "adapter")
    return root / "adapter", logits(model)


def test_the_base_gets_the_tokens_that_the_adapter_brings(saved):
    folder, expected = saved
    for base in (folder.parent / "llama", load_base(folder.parent / "llama")[0]):
        assert torch.equal(logits(from_pretrained(base, folder)), expected)


def read_lora(folder, out):
    base, _ = load_base(folder.parent / "llama")
    base.resize_token_embeddings(101, mean_resizing=False)
    return PeftModel.from_pretrained(base, str(out))


READERS = {
    "adapter": lambda folder, out: from_pretrained(folder.parent / "llama", out),
    "peft-lora": read_lora,
    "dense": lambda folder, out: AutoModelForCausalLM.from_pretrained(out),
    "standalone": lambda folder, out: writing._read_back(out, torch.float32),
}


@pytest.mark.parametrize("form", READERS)
def test_exports_keep_new_tokens(form, saved, tmp_path):
    folder, expected = saved
    words = ["export", str(folder), "--to", form, "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    json.loads(done.output)
    torch.testing.assert_close(logits(READERS[form](folder, tmp_path / "out")), expected, rtol=0, atol=2e-6)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids(NEW) == 100


def test_new_tokens_are_served(saved):
    folder, expected = saved
    roster = load_roster([find_source(str(folder))])
    assert roster.num_tokens == 101 and roster.tokenizer.convert_tokens_to_ids(NEW) == 100
    roster.activate(roster.find("adapter"))
    assert torch.equal(logits(roster.model), expected)
