"""Merging from folders: of runs, of saved adapters; what is read, what is refused."""

import io
import json

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import mixora
from mixora.bases import load_base
from mixora.errors import CheckpointError, ConfigError
from mixora.merging.comparison import Comparison
from mixora.training.merging import merge_folder
from mixora.training.progress import Progress
from mixora.training.run import fit
from mixora.training.run_config import read_run
from mixora.training.summaries import _tabulate, summarise_merge
from tests.models import adapt

SILENT = Progress(Console(quiet=True))


def train(base, source, out, **adapter):
    tree = {
        "model": {"base": str(base)},
        "data": {"source": str(source)},
        "adapter": adapter,
        "train": {"steps": 2, "batch_size": 4, "learning_rate": 0.01},
        "evaluate": {"limit": 4, "max_new_tokens": 3},
        "out": str(out),
    }
    fit(read_run(tree), SILENT)
    return out


def logits(model, tokenizer):
    batch = tokenizer(["lamp hall 3", "song folk 11"], return_tensors="pt", padding=True)
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def test_the_run_of_a_classifier_brings_its_head(bases, data, tmp_path):
    run = train(bases / "bert", data / "classes", tmp_path / "run", recipe="lora", rank=4)
    merged = merge_folder(run, tmp_path / "out", {}, SILENT)
    assert {site.method for site in merged.sites} == {"exact"}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ours, _ = load_base(str(bases / "bert"), task="sequence-classification", num_labels=2)
    theirs = AutoModelForSequenceClassification.from_pretrained(bases / "bert", num_labels=2)
    expected = logits(mixora.from_pretrained(ours, run / "adapter"), tokenizer)
    found = logits(PeftModel.from_pretrained(theirs, tmp_path / "out"), tokenizer)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for folder in (run / "adapter", tmp_path / "out"):
        assert "num_labels=2)" in (folder / "README.md").read_text()


@pytest.mark.parametrize("fit_rows", [None, 4])
def test_a_dense_classifier_names_its_classes(fit_rows, bases, data, tmp_path):
    recipe = {"recipe": "lora"} if fit_rows is None else {"recipe": "sira", "num_experts": 2, "top_k": 1}
    run = train(bases / "bert", data / "classes", tmp_path / "run", **recipe, rank=2)
    merge_folder(run, tmp_path / "out", {}, SILENT, to="dense", fit_rows=fit_rows)
    classify = pipeline("text-classification", str(tmp_path / "out"))
    labels = tuple(json.loads((run / "record.json").read_text())["labels"])
    assert tuple(classify.model.config.id2label.values()) == labels
    assert classify("lamp hall 3")[0]["label"] in labels and "LABEL_0" not in labels


def test_the_run_of_a_routed_mixture_is_fitted_on_its_training_rows(bases, data, tmp_path):
    small = {"num_experts": 4, "top_k": 2, "rank": 2}
    run = train(bases / "llama", data / "commands", tmp_path / "run", recipe="sira", **small)
    merged = merge_folder(run, tmp_path / "out", {"data": {"packing": True}}, SILENT, fit_rows=6)
    assert merged.fitted_on == "2 batches of 6 rows of train.jsonl"
    assert {(site.method, site.rank) for site in merged.sites} == {("fitted", 4)}
    record = json.loads((run / "record.json").read_text())
    # the same rows, and the same mean over supervised tokens, as the run measured
    assert abs(merged.changes.loss_of_mixture - record["after"]["loss"]) < 1e-5
    text = io.StringIO()
    console = Console(file=text, width=120)
    for part in summarise_merge(merged):
        console.print(part)
    for word in (
        "8 sites in model.layers",
        "*.self_attn.q_proj",
        "fitted",
        "held-out predictions",
        "KL divergence",
        str(tmp_path / "out")[:40],
    ):
        assert word in text.getvalue()


@pytest.fixture
def bare(bases, tmp_path):
    """A folder that save_pretrained wrote, of an adapter that does not name its base."""

    def make(recipe, **changes):
        base, _ = load_base(str(bases / "llama"))
        model = adapt(base, mixora.recipe(recipe, task_type="CAUSAL_LM", **changes))
        model.peft_config["default"].base_model_name_or_path = None
        base.name_or_path = ""
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return make


def test_a_saved_adapter_needs_a_base_and_rows(bare, bases, data, tmp_path):
    adapter, out = bare("sira", num_experts=4, top_k=2, rank=2), tmp_path / "out"
    model, source = {"model": {"base": str(bases / "llama")}}, {"data": {"source": str(data / "commands")}}
    with pytest.raises(ConfigError, match=r"model.base: .* does not name its base; valid: --model BASE"):
        merge_folder(adapter, out, {}, SILENT, fit_rows=4)
    with pytest.raises(ConfigError, match="data: is required"):
        merge_folder(adapter, out, model, SILENT, fit_rows=4)
    with pytest.raises(ConfigError, match="fit_rows: got 0; valid: 1 or more"):
        merge_folder(adapter, out, {**model, **source}, SILENT, fit_rows=0)
    merged = merge_folder(adapter, out, {**model, **source}, SILENT, fit_rows=4, rank=3)
    assert {site.rank for site in merged.sites} == {3} and merged.changes.predictions > 0


def test_a_dense_model_comes_with_its_tokenizer(bare, bases, tmp_path):
    adapter = bare("lora", rank=4)
    model = {"model": {"base": str(bases / "llama")}}
    with pytest.raises(ConfigError, match="data: an exact export looks at no rows; valid: with --approximate"):
        merge_folder(adapter, tmp_path / "out", {**model, "data": {"source": "rows.jsonl"}}, SILENT)
    merge_folder(adapter, tmp_path / "out", model, SILENT, to="dense")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokenizer)
    base, _ = load_base(str(bases / "llama"))
    expected = logits(mixora.from_pretrained(base, adapter), tokenizer)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config.json and no adapter_model.safetensors"):
        merge_folder(tmp_path, tmp_path / "out", {}, SILENT)


def test_a_soup_is_cooked_on_the_evaluation_rows(bases, data, tmp_path):
    run = train(bases / "llama", data / "commands", tmp_path / "run", recipe="adamix-lora", num_experts=2, rank=2)
    merged = merge_folder(run, tmp_path / "out", {}, SILENT, soup=True)
    assert len(merged.soup.losses) == 2
    text = io.StringIO()
    for part in summarise_merge(merged):
        Console(file=text, width=120).print(part)
    assert "soup of experts" in text.getvalue()
    with pytest.raises(ConfigError, match=r"data: an exact export looks at no rows.*--soup"):
        merge_folder(run, tmp_path / "more", {"data": {"packing": True}}, SILENT)


@pytest.mark.parametrize("divergence", [None, 0.25])
def test_numbers_that_are_no_distribution_have_no_divergence(divergence):
    told = io.StringIO()
    Console(file=told, width=120).print(_tabulate(Comparison(8, 1.0, 1.5, 0.1, 0.2, divergence)))
    assert "8 held-out predictions" in told.getvalue() and "1.5000" in told.getvalue()
    assert ("KL divergence" in told.getvalue()) == (divergence is not None)
