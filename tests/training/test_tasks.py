"""A run on several tasks: what is drawn, scores and routing of each, and the command line on the result."""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import datasets
import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

import mixora
from mixora.bases import load_base
from mixora.cli import app
from mixora.data import mix
from mixora.diagnostics.record import read_record
from mixora.errors import ConfigError, DataError
from mixora.training.material import make_examples, make_training_set, read_material, read_task
from mixora.training.merging import sample
from mixora.training.results import reopen
from mixora.training.run import measure
from mixora.training.run_config import read_run
from mixora.training.tasks import name_metrics
from tests.models import tiny_llama, token_ids
from tests.training.test_run import quiet, run, settings

SHARED = Path(os.environ.get("MIXORA_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@pytest.fixture
def sources(data, tmp_path):
    """Beside `commands` and `classes`: choices without a validation split, text, and other classes."""

    def write(name, rows):
        path = tmp_path / "data" / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    asked = [{"question": f"{n} + {n}", "choices": [str(2 * n), "no"], "answer": 0, "task": "own"} for n in range(20)]
    write("sums.jsonl", asked)
    write("words.jsonl", [{"text": f"row {n} of many"} for n in range(40)])
    write("moods.jsonl", [{"text": f"row {n}", "label": ["sad", "glad"][n % 2]} for n in range(20)])
    write("lamps.jsonl", [{"text": f"lamp {n}", "label": ["song", "lamp"][n % 2]} for n in range(20)])
    return data


def of_tasks(base, out, tasks, **changes):
    tree = settings(base, "unused", out, **changes)
    del tree["data"]["source"]
    tree["data"]["tasks"] = {
        name: {"source": str(task)} if isinstance(task, Path) else {**task, "source": str(task["source"])}
        for name, task in tasks.items()
    }
    return tree


@pytest.fixture
def two(bases, sources, tmp_path):
    """Settings of a run on commands and sums."""
    tasks = {"commands": sources / "commands", "sums": sources / "sums.jsonl"}
    return of_tasks(bases / "llama", tmp_path / "out", tasks, data__mixing={"temperature": 2.0})


def test_the_record_tells_of_each_task(two, tmp_path):
    config, record = run(two)
    assert read_record(tmp_path / "out") == record
    assert list(record.tasks) == ["commands", "sums"]
    assert (*name_metrics(config, read_task(config)[1]), "rows") == tuple(record.after)
    commands, sums = record.tasks.values()
    assert (commands["rows"], sums["rows"]) == (32, 18)
    assert commands["share"] == pytest.approx(4 / 7)  # sqrt(32) to sqrt(18)
    assert commands["drawn"] + sums["drawn"] == 4 * 4
    assert {"exact_match", "slot_f1"} < set(commands["after"]) and {"accuracy_norm", "loss"} < set(sums["after"])
    assert commands["held_out"] == 6 and sums["held_out"] == 2 and record.after["rows"] == 8
    for when, scores in (("before", record.before), ("after", record.after), ("reloaded", record.reloaded)):
        assert scores["loss"] == pytest.approx((commands[when]["loss"] + sums[when]["loss"]) / 2)
        assert set(scores) <= {"loss", "rows"}
    assert commands["reloaded"] == commands["after"] and sums["reloaded"] == sums["after"]
    assert record.after["loss"] < record.before["loss"]
    assert record.load["groups"] == ["commands", "sums"]
    assert len(record.load["load"]) == len(record.routing)
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">Tasks</h2>" in page and "accuracy norm" in page


def test_scores_of_a_task_are_those_of_a_run_on_it_alone(two, sources, tmp_path):
    """The untouched base knows nothing of what else is in the run."""
    _, record = run(two)
    alone = {**two, "data": {"source": str(sources / "sums.jsonl")}, "out": str(tmp_path / "alone")}
    alone["evaluate"] = {**two["evaluate"], "metrics": ["accuracy", "accuracy_norm", "loss"]}
    _, of_sums = run(alone)
    assert of_sums.before == {**record.tasks["sums"]["before"], "rows": 2}
    assert of_sums.tasks == {}


def test_the_command_line_on_two_tasks(bases, sources, tmp_path):
    def call(*words):
        done = CliRunner().invoke(app, [str(word) for word in words])
        assert done.exit_code == 0, done.output
        return done.output

    out = tmp_path / "out"
    tasks = [f"data.tasks.commands.source={sources / 'commands'}", f"data.tasks.sums.source={sources / 'sums.jsonl'}"]
    small = ["adapter.num_experts=4", "adapter.top_k=2", "adapter.rank=2", "train.steps=2", "train.batch_size=4"]
    words = [*tasks, "data.tasks.sums.weight=1", "data.tasks.commands.weight=3", *small, "evaluate.max_new_tokens=3"]
    told = " ".join(call("train", *words, "--model", bases / "llama", "--out", out).split())
    assert "75.0%" in told and "each task; the scores above are their means" in told
    record = read_record(out)
    measured = json.loads(call("evaluate", out, "--json"))
    assert measured["tasks"] == {name: task["after"] for name, task in record.tasks.items()}
    assert measured["loss"] == record.after["loss"]
    assert list(json.loads(call("evaluate", out, "--task", "sums", "--json"))["tasks"]) == ["sums"]
    text = call("evaluate", out)
    assert "mean over tasks" in text and "accuracy norm" in text and "slot f1" in text
    other = call("evaluate", out, "data.tasks.sums.evaluation_split=train", "--task", "sums", "--json")
    assert json.loads(other)["tasks"]["sums"]["loss"] != record.tasks["sums"]["after"]["loss"]
    sites = json.loads(call("inspect", out, "--json"))
    for site in sites:
        assert set(site["tasks"]) == {"commands", "sums"}
        assert all(math.isclose(sum(found["load"]), 1, rel_tol=1e-6) for found in site["tasks"].values())
        assert site["tasks"]["sums"]["load"] != site["tasks"]["commands"]["load"]
    assert call("inspect", out).count("  sums") == len(sites)
    assert call("inspect", out, "--task", "commands").count("  sums") == 0


def test_one_causal_model_learns_from_three_forms(bases, sources, tmp_path):
    tasks = {"commands": sources / "commands", "sums": sources / "sums.jsonl", "words": sources / "words.jsonl"}
    tree = of_tasks(bases / "llama", tmp_path / "out", tasks, data__prompt_format="plain", data__group_by="domain")
    _, record = run(tree)
    assert record.tasks["words"]["after"].keys() == {"loss", "perplexity"}
    assert record.load["groups"] == ["lamp", "song"]  # a field that one of the tasks has
    assert set(record.after) == {"loss", "rows"}
    words = reopen(tmp_path / "out", {}, quiet(), ["words"]).measure()
    assert words["tasks"] == {"words": record.tasks["words"]["after"]}


def test_packed_bins_are_of_one_task_and_an_epoch_is_each_once(two):
    two["data"] |= {"packing": True, "max_length": 128, "mixing": None}
    two["train"] = {"epochs": 2.0, "batch_size": 4}
    config = read_run(two)
    found = make_training_set(read_material(config), config)
    assert len(found.dataset) == 2 * sum(task["rows"] for task in found.tasks.values())
    assert Counter(found.dataset["task"]) == {name: 2 * task["rows"] for name, task in found.tasks.items()}
    sizes = {len(bin_) for bin_ in found.dataset["input_ids"]}
    assert max(sizes) <= 128 and found.tasks["commands"]["rows"] < 32


def test_tasks_of_the_same_classes_share_a_head(bases, sources, tmp_path):
    tasks = {"classes": sources / "classes", "lamps": sources / "lamps.jsonl"}
    _, record = run(of_tasks(bases / "bert", tmp_path / "out", tasks))
    means = {"accuracy", "f1", "mcc"}
    assert set(record.after) == {*means, "rows"}
    for name in means:
        assert record.after[name] == pytest.approx(sum(task["after"][name] for task in record.tasks.values()) / 2)


def test_merging_fits_on_rows_of_all_tasks(two):
    config = read_run(two)
    material = read_material(config)
    found = sample(material, config, 50)
    assert found.origin.startswith("50 rows of ") and found.origin.count(".jsonl") == 2
    assert sum(len(batch["input_ids"]) for batch in found.fit) == 50
    assert sum(len(batch["input_ids"]) for batch in found.held_out) == 8


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"source": "x"}, ConfigError, r"data: got both source and tasks; valid: one of them"),
        ({"tasks": None}, ConfigError, r"data: got neither source nor tasks"),
        ({"tasks": {}}, ConfigError, r"data: tasks: got none; valid: one or more"),
        ({"tasks": None, "source": "x"}, ConfigError, r"data: mixing: has no effect on one source"),
        ({"mixing": {"temperature": 0}}, ConfigError, r"data\.mixing\.temperature: got 0; valid: greater than 0"),
        ({"tasks": {"a": {"source": "x", "weight": 1}}}, ConfigError, r"mixing: has no effect beside weights, which a"),
        (
            {"tasks": {"a": {"source": "x", "weight": 1}, "b": {"source": "y"}}, "mixing": None},
            ConfigError,
            r"data: tasks: no weight for b; valid: a weight for each task, or for none",
        ),
        ({"tasks": {"a": {"sorce": "x"}}}, ConfigError, r"data\.tasks\.a\.sorce: unknown key; did you mean 'source'"),
        ({"tasks": {"a": {"source": "nowhere.jsonl"}}}, DataError, r"nowhere\.jsonl: no such file"),
    ],
)
def test_mistakes_are_named(changes, error, message, two):
    two["data"] |= changes
    with pytest.raises(error, match=message):
        read_material(read_run(two))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("commands", "classes"), r"cannot write and tell classes apart: got commands: completion, classes: classif"),
        (("classes", "moods.jsonl"), r"different labels: got classes: lamp, song; moods\.jsonl: glad, sad; valid: the"),
    ],
)
def test_tasks_that_no_one_model_can_learn_are_refused(names, message, bases, sources, tmp_path):
    tree = of_tasks(bases / "bert", tmp_path / "out", {name: sources / name for name in names})
    with pytest.raises(ConfigError, match=message):
        read_material(read_run(tree))


def test_only_tasks_of_the_run_can_be_picked(two, data, tmp_path):
    run(two)
    with pytest.raises(ConfigError, match=r"task: got 'sum', which is no task of the run; did you mean 'sums'"):
        reopen(tmp_path / "out", {}, quiet(), ["sum"])
    with pytest.raises(ConfigError, match="got both source and tasks"):
        reopen(tmp_path / "out", {"data": {"source": str(data / "commands")}}, quiet())
    changes = {"data": {"source": str(data / "commands"), "tasks": None, "mixing": None}}
    assert set(reopen(tmp_path / "out", changes, quiet()).material.tasks) == {"commands"}
    with pytest.raises(ConfigError, match="the run has one source and no tasks"):
        reopen(tmp_path / "out", changes, quiet(), ["sums"])


def test_a_resumed_training_sees_the_rows_it_would_have_seen(tmp_path):
    ids = {"one": token_ids(6, 8).tolist(), "other": token_ids(16, 8, seed=1).tolist()}
    tasks = {name: datasets.Dataset.from_dict({"input_ids": rows, "labels": rows}) for name, rows in ids.items()}
    rows = mix(tasks, temperature=5, rows=24, seed=3)

    def train(resume):
        torch.manual_seed(0)
        config = mixora.recipe("sira", num_experts=2, top_k=1, rank=2, task_type="CAUSAL_LM")
        arguments = transformers.TrainingArguments(
            str(tmp_path / "out"),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=4,
            train_sampling_strategy="sequential",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            label_names=["labels"],
        )
        trainer = mixora.Trainer(peft.get_peft_model(tiny_llama(), config), arguments, train_dataset=rows)
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3") if resume else None)
        return peft.get_peft_model_state_dict(trainer.model)

    straight, resumed = train(resume=False), train(resume=True)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not there; MIXORA_SHARED_DATA names another folder")
def test_real_sets_of_three_forms_are_read_drawn_and_scored(bases, tmp_path):
    names = ("gsm8k", "scienceqa_text", "natinst_v1")
    tasks = {name: {"source": SHARED / name, "train_rows": 60 + 40 * n} for n, name in enumerate(names)}
    config = read_run(of_tasks(bases / "llama", tmp_path / "out", tasks, data__max_length=96, train__steps=30))
    material = read_material(config)
    found = make_training_set(material, config)
    assert [task["rows"] for task in found.tasks.values()] == [60, 100, 140]
    assert [task["drawn"] for task in found.tasks.values()] == pytest.approx([24, 40, 56], abs=20)
    scores = measure(material.model, make_examples(material, config), config, quiet(), "before")
    assert all(math.isfinite(scores[name].metrics["loss"]) for name in names)


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning", "ignore:'pin_memory' argument"
)
def test_the_python_of_the_guide_runs(bases, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, size in (("sums", 20), ("letters", 40)):
        rows = [{"prompt": f"{name} {n}", "completion": f" {2 * n}"} for n in range(size)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, tokenizer = load_base(str(bases / "llama"))
    config = mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM")
    names = {"model": peft.get_peft_model(base, config), "tokenizer": tokenizer}
    guide = (Path(__file__).parents[2] / "docs" / "guide" / "tasks.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", guide, flags=re.DOTALL):
        exec(block, names)
    assert Counter(names["rows"]["task"]).keys() == {"sums", "letters"}
    assert names["trainer"].state.global_step == 4
    assert {"eval_sums_loss", "eval_letters_loss"} <= names["trainer"].evaluate().keys()
    assert "'letters': [" in capsys.readouterr().out
