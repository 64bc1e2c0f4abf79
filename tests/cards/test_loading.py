"""The code of a card, run as it stands: the model that it loads computes what the card is of."""

from pathlib import Path

import peft
import pytest
import torch
from typer.testing import CliRunner

import mixora
from mixora.bases import base as bases
from mixora.bases import load_base
from mixora.cards import Card, Facts, facts_of
from mixora.cli import app
from mixora.short_names import SHORT_NAMES, Packaged
from tests.characters import build_tokenizer, save_bases
from tests.models import adapt, fill, tiny_bert_classifier, token_ids

IDS = token_ids(2, 9)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **decoder(model)).logits


def decoder(model):
    return {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}


def run_code(card):
    names = {}
    exec(card.split("```python\n")[1].split("```")[0], names)
    return names["model"]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Tiny bases in folders; the encoder has no head of its own."""
    root = tmp_path_factory.mktemp("bases")
    save_bases(root)
    tiny_bert_classifier().bert.save_pretrained(root / "encoder")
    build_tokenizer().save_pretrained(root / "encoder")
    return root


def classifier(base, outputs, task_type="SEQ_CLS"):
    model, _ = load_base(base, task="sequence-classification", num_labels=outputs)
    model = adapt(model, mixora.recipe("lora", rank=2, task_type=task_type))
    return fill(model, seed=3, names=("modules_to_save.default",))


@pytest.mark.parametrize("outputs", [1, 2, 3])
@pytest.mark.parametrize("form", ["peft-lora", "dense"])
def test_a_merged_classifier(form, outputs, places, tmp_path):
    # PEFT's own name of the task, or its value
    model = classifier(places / "encoder", outputs, peft.TaskType.SEQ_CLS if outputs == 3 else "SEQ_CLS")
    expected = logits(model)
    mixora.merge(model, tmp_path / "out", to=form)
    torch.testing.assert_close(logits(run_code((tmp_path / "out/README.md").read_text())), expected)


@pytest.mark.parametrize("outputs", [1, 3])
def test_the_copy_of_a_classifier(outputs, places, tmp_path):
    model = classifier(places / "encoder", outputs)
    model.save_pretrained(tmp_path / "adapter")
    words = ["export", tmp_path / "adapter", "--to", "adapter", "--out", tmp_path / "out"]
    assert CliRunner().invoke(app, list(map(str, words))).exit_code == 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"from_pretrained({str(places / 'encoder')!r}, num_labels={outputs})".replace("'", '"') in card
    assert torch.equal(logits(run_code(card)), logits(model))
    assert f"and its kin, given `num_labels={outputs}`, load a base too" in card
    both = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "out", num_labels=outputs)
    assert torch.equal(logits(both), logits(model))


@pytest.mark.parametrize(
    ("kind", "task"), [("llama", "causal-lm"), ("t5", "seq2seq-lm"), ("encoder", "sequence-classification")]
)
@pytest.mark.parametrize("name", ["tiny", "{folder}/tiny.gguf", "~/tiny"])
def test_what_mixora_alone_can_read(name, kind, task, places, tmp_path, monkeypatch):
    """A model inside of a package, a GGUF file, which here is unpacked to a folder that is there already, a home."""
    name = name.format(folder=tmp_path)
    (tmp_path / "tiny.gguf").touch()
    (tmp_path / "tiny").symlink_to(places / kind)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(SHORT_NAMES, "tiny", Packaged("none", "none", "model"))
    monkeypatch.setattr(bases, "_find_packaged", lambda name: places / kind)
    monkeypatch.setattr(bases, "unpack_gguf", lambda file: places / kind)
    outputs = 3 if kind == "encoder" else None
    model, _ = load_base(name, task=task, num_labels=outputs)
    model = adapt(model, mixora.recipe("lora", rank=2, task_type=bases.TASK_TYPES[task]))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    about = facts_of(model.peft_config["default"], outputs=outputs)
    again = run_code(Card("adapter", about).render(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(model))


def test_the_short_name_of_an_encoder_says_its_task():
    card = Card("adapter", Facts("minilm-l6", "SEQ_CLS", outputs=1)).render(Path("x"))
    assert 'load_base("minilm-l6", task="sequence-classification", num_labels=1)' in card
