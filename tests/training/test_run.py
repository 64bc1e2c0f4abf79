"""A run from data to report, on each kind of model, with what it leaves behind."""

import json
import math

import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

import mixora
from mixora.config import read_yaml
from mixora.diagnostics.record import read_record
from mixora.errors import CheckpointError, ConfigError, DataError, ModelError
from mixora.files.folders import MARK, check_folder, claim_folder
from mixora.training.material import make_training_set, read_material
from mixora.training.progress import Progress
from mixora.training.results import reopen
from mixora.training.run import build, fit
from mixora.training.run_config import read_run
from mixora.training.run_folder import open_folder


def quiet():
    return Progress(Console(quiet=True))


def settings(base, data, out, **changes):
    tree = {
        "model": {"base": str(base)},
        "data": {"source": str(data)},
        "adapter": {"recipe": "sira", "num_experts": 4, "top_k": 2, "rank": 2},
        "train": {"steps": 4, "batch_size": 4, "learning_rate": 0.01},
        "evaluate": {"limit": 6, "max_new_tokens": 4},
        "out": str(out),
    }
    for path, value in changes.items():
        section, _, name = path.partition("__")
        tree[section][name] = value
    return tree


def run(tree):
    config = read_run(tree)
    return config, fit(config, quiet())


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generating_models(kind, bases, data, tmp_path):
    _, record = run(settings(bases / kind, data / "commands", tmp_path / "out"))
    assert record.after["loss"] < record.before["loss"]
    assert set(record.after) == {"loss", "perplexity", "exact_match", "intent_accuracy", "slot_f1", "rows"}
    assert record.reloaded == {name: record.after[name] for name in record.reloaded}
    assert [line["step"] for line in record.history] == [1, 2, 3, 4]
    assert all(0.5 < line["load_balance"] < 4 for line in record.history)
    assert record.load["groups"] == ["lamp", "song"]
    assert all(math.isclose(sum(e), 1, rel_tol=1e-6) for site in record.load["load"] for e in site)
    assert len(record.generations) == 3
    assert record.parameters["active"] < record.parameters["trainable"] < record.parameters["total"]
    assert read_record(tmp_path / "out") == record
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {MARK, "adapter", "report.html", "record.json", "loss.png", "expert_load.png", "run.yaml"}


def test_classifier_trains_its_head_and_groups_by_a_named_field(bases, data, tmp_path):
    _, record = run(settings(bases / "bert", data / "classes", tmp_path / "out", data__group_by="lang"))
    assert set(record.after) == {"accuracy", "f1", "mcc", "rows"}
    assert record.load["groups"] == ["en"]
    assert record.generations == []
    tensors = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert any("classifier" in name for name in tensors)
    assert any("mixora_router" in name for name in tensors)
    with pytest.raises(DataError, match="this model classifies and cannot generate; valid: mixora evaluate"):
        reopen(tmp_path / "out", {}, quiet()).answer(["a"], 1, sample=False, compare=False)


def test_plain_lora_has_no_routing_to_report(bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out")
    tree["adapter"] = {"recipe": "lora", "rank": 2}
    _, record = run(tree)
    assert record.routing == [] and record.load is None
    assert record.after["loss"] < record.before["loss"]


@pytest.mark.parametrize("kind", ["groups", "proportional", "spectral", "sensitivity"])
def test_a_budget_is_allocated_with_training_rows_and_stored(kind, bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out")
    tree["adapter"] = {"recipe": "hilo", "num_experts": {"from": 2, "to": 4}, "rank": [2, 3], "budget": 15_000}
    tree["adapter"]["allocator"] = {"kind": kind}
    _, record = run(tree)
    assert 15_000 - 80 < record.parameters["trainable"] <= 15_000
    assert record.reloaded == {name: record.after[name] for name in record.reloaded}
    assert record.after["loss"] < record.before["loss"]
    stored = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert len(stored["allocation"]) == 14 and stored["allocator"]["kind"] == kind


def test_sensitivity_looks_at_as_many_batches_as_asked(bases, data, tmp_path, monkeypatch):
    looked = []
    forward = LlamaForCausalLM.forward

    def count(self, *args, **kwargs):
        looked.append(kwargs["input_ids"].shape[0])
        return forward(self, *args, **kwargs)

    tree = settings(bases / "llama", data / "commands", tmp_path / "out")
    tree["adapter"] |= {"allocator": {"kind": "sensitivity", "batches": 3}}
    config = read_run(tree)
    material = read_material(config)
    training_set = make_training_set(material, config)
    monkeypatch.setattr(LlamaForCausalLM, "forward", count)
    first, _ = build(material, training_set, config, quiet())
    assert looked == [4, 4, 4]
    assert build(material, training_set, config, quiet())[0].allocation == first.allocation


def test_the_way_to_compute_attention_may_be_chosen_and_is_recorded(bases, data, tmp_path):
    scores = {}
    for name in ("sdpa", "eager"):
        tree = settings(bases / "llama", data / "commands", tmp_path / name)
        tree["model"]["attn_implementation"] = name
        _, record = run(tree)
        scores[name] = record.after["loss"]
        config = read_run(read_yaml(tmp_path / name / "run.yaml"))
        assert read_material(config, to_train=False).model.config._attn_implementation == name
    assert scores["eager"] == pytest.approx(scores["sdpa"], rel=1e-3)
    tree["model"]["attn_implementation"] = "eger"
    with pytest.raises(ModelError, match="eger"):
        read_material(read_run(tree))


def test_same_seed_same_run(bases, data, tmp_path):
    records = [run(settings(bases / "llama", data / "commands", tmp_path / n))[1] for n in "ab"]
    assert records[0].history == records[1].history
    assert records[0].after == records[1].after


def test_packing_trains_and_held_out_rows_come_from_the_end_without_a_split(bases, data, tmp_path):
    only_train = data / "commands" / "train.jsonl"
    tree = settings(bases / "llama", only_train, tmp_path / "out", data__packing=True, data__max_length=128)
    _, record = run(tree)
    assert record.after["rows"] == 3
    assert record.after["loss"] < record.before["loss"]


def test_truncation_is_told(bases, data, tmp_path):
    _, record = run(settings(bases / "llama", data / "commands", tmp_path / "out", data__max_length=24))
    assert any("lost tokens" in note for note in record.notes)


def test_reopened_run_measures_inspects_and_answers(bases, data, tmp_path):
    _, record = run(settings(bases / "llama", data / "commands", tmp_path / "out"))
    trained = reopen(tmp_path / "out", {}, quiet())
    assert trained.measure() == record.after
    assert {site["path"] for site in trained.inspect()} == {site["path"] for site in record.routing}
    (answer,) = trained.answer(["lamp hall 3"], 4, sample=False, compare=True)
    assert set(answer) == {"prompt", "base", "answer"}
    other = reopen(tmp_path / "out", {"data": {"evaluation_split": "train"}}, quiet())
    assert len(other.material.tasks["commands"].evaluation) == 32


def test_from_pretrained_takes_a_folder_and_repeats_the_loss(bases, data, tmp_path):
    run(settings(bases / "llama", data / "commands", tmp_path / "out"))
    model = mixora.from_pretrained(bases / "llama", tmp_path / "out" / "adapter")
    assert not any(p.requires_grad for p in model.parameters())
    trainable = mixora.from_pretrained(str(bases / "llama"), tmp_path / "out" / "adapter", is_trainable=True)
    assert any(p.requires_grad for p in trainable.parameters())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adapter__rnak": 3}, ConfigError, r"adapter: rnak: reaches no part.*did you mean 'rank'"),
        ({"adapter__top_k": 9}, ConfigError, r"adapter: .*top_k 9 is more than num_experts 4"),
        ({"adapter__recipe": "siar"}, ConfigError, r"adapter: recipe: got 'siar'.*'sira'"),
        ({"train__stepz": 3}, ConfigError, r"train\.stepz: unknown key; did you mean 'steps'"),
        ({"train__steps": 0}, ConfigError, r"train\.steps: got 0; valid: greater than or equal to 1"),
        ({"train__arguments": {"no_such": 1}}, ConfigError, r"train\.arguments: .*no_such"),
        ({"model__task": "seq2seq-lm"}, ConfigError, r"model\.task: got 'seq2seq-lm'; valid .*'causal-lm'"),
        ({"data__evaluation_split": "tset"}, DataError, r"no split 'tset'"),
        ({"evaluate__metrics": ["blue"]}, ConfigError, r"metrics: got 'blue'.*did you mean 'bleu'"),
    ],
)
def test_mistakes_are_named(change, error, message, bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out", **change)
    with pytest.raises(error, match=message):
        run(tree)


def test_one_row_is_not_split(bases, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match="one row cannot be split into training and evaluation; valid: two or more"):
        run(settings(bases / "llama", tmp_path / "rows.jsonl", tmp_path / "out"))


def test_folders_are_never_replaced_by_accident(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"mine (is not empty|was not written by mixora)"):
            check_folder(tmp_path / "mine", overwrite)
    claim_folder(tmp_path / "run")
    check_folder(tmp_path / "run")  # nothing but the mark: whoever claimed it came no further
    (tmp_path / "run" / "results.txt").write_text("x")
    with pytest.raises(ConfigError, match="--overwrite"):
        check_folder(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"run holds .*results\.txt, which is read"):
        claim_folder(tmp_path / "run", overwrite=True, reads=[tmp_path / "run" / "results.txt"])
    assert (tmp_path / "run" / "results.txt").exists()
    claim_folder(tmp_path / "run", overwrite=True)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [MARK]
    (tmp_path / "file").write_text("x")
    below = read_run(settings("base", "data", tmp_path / "file" / "below"))
    with pytest.raises(ConfigError, match="cannot be written"):
        open_folder(below, overwrite=False)


@pytest.mark.parametrize(
    "mistake",
    [{"data__source": "nowhere.jsonl"}, {"evaluate__metrics": ["blue"]}, {"train__arguments": {"no_such": 1}}],
)
def test_a_mistake_costs_no_earlier_results(mistake, bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out")
    _, record = run(tree)
    with pytest.raises((ConfigError, DataError)):
        fit(
            read_run(settings(bases / "llama", data / "commands", tmp_path / "out", **mistake)), quiet(), overwrite=True
        )
    assert read_record(tmp_path / "out") == record
    assert reopen(tmp_path / "out", {}, quiet()).measure()["loss"] == record.after["loss"]
    tree["train"]["steps"] = 1
    assert len(fit(read_run(tree), quiet(), overwrite=True).history) == 1


def test_paths_in_ones_home_are_found_by_a_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_run(settings("base", "~/rows.jsonl", "~/out"))
    assert (config.data.source, config.out) == (str(tmp_path / "rows.jsonl"), str(tmp_path / "out"))
    claim_folder(tmp_path / "out")
    (tmp_path / "out" / "base").mkdir()
    with pytest.raises(ConfigError, match="holds ~/out/base, which is read"):
        check_folder(config.out, overwrite=True, reads=["~/out/base"])


def test_only_a_finished_run_can_be_reopened(tmp_path):
    with pytest.raises(CheckpointError, match="is not the folder of a finished run"):
        reopen(tmp_path, {}, quiet())


def test_damaged_adapters_are_one_clear_error(bases, data, tmp_path):
    run(settings(bases / "llama", data / "commands", tmp_path / "out"))
    folder = tmp_path / "out" / "adapter"
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first, second, *_ = sorted(tensors)
    broken = {**tensors, "extra": tensors[first].clone(), second: tensors[second][:1].clone()}
    del broken[first]
    save_file(broken, weights)
    with pytest.raises(CheckpointError) as caught:
        mixora.from_pretrained(bases / "llama", folder)
    text = str(caught.value)
    assert "3 tensors do not fit" in text and f"{first}: missing" in text and "extra: unexpected" in text
    assert f"{second}: got [1, " in text
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        mixora.from_pretrained(bases / "llama", folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"has no adapter_model\.safetensors"):
        mixora.from_pretrained(bases / "llama", folder)
    save_file(tensors, weights)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA", "plan": None}))
    with pytest.raises(CheckpointError, match="is an adapter of type LORA; valid: MIXORA"):
        mixora.from_pretrained(bases / "llama", folder)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is damaged"):
        mixora.from_pretrained(bases / "llama", folder)


def test_a_run_that_is_measured_by_its_loss_alone_shows_no_answers(bases, data, tmp_path):
    tree = settings(bases / "llama", data / "commands", tmp_path / "out")
    tree["evaluate"] = {"limit": 2, "metrics": ["loss"]}
    record = fit(read_run(tree), quiet())
    assert set(record.after) == {"loss", "rows"} and record.generations == []
