"""A saved adapter under EleutherAI's harness, in a process of its own: likelihoods and accuracy are those by hand."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import mixora
from tests.compatibility.texts import make_tokenizer, words
from tests.models import adapt, tiny_llama, token_ids

ROOT = Path(__file__).parents[2]
QUESTIONS = token_ids(12, 6, seed=1).tolist()
CHOICES = token_ids(12 * 3, 3, seed=2).reshape(12, 3, 3).tolist()
# of unequal length, so that the harness has to pad
CHOICES = [[choice[: 1 + (n + k) % 3] for k, choice in enumerate(row)] for n, row in enumerate(CHOICES)]
ANSWERS = [n % 3 for n in range(12)]
TASK = {
    "task": "local_choices",
    "dataset_path": "json",
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder):
    rows = [
        {"question": words(question), "choices": [words(choice) for choice in choices], "answer": answer}
        for question, choices, answer in zip(QUESTIONS, CHOICES, ANSWERS, strict=True)
    ]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = {**TASK, "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    (folder / "task.yaml").write_text(yaml.safe_dump(task))


def command_of_the_guide():
    """The line in front of the harness's own options."""
    text = (ROOT / "docs" / "guide" / "harness.md").read_text()
    (statement,) = re.findall(r'^python -c "(.+)" run \\$', text, re.MULTILINE)
    return [sys.executable, "-W", "ignore", "-c", statement, "run"]


def run_harness(folder, *options):
    done = subprocess.run(
        [*command_of_the_guide(), "--model", "hf", "--tasks", "local_choices", "--include_path", str(folder), *options],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}/src",
            "HF_HOME": str(folder / "cache"),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def log_likelihood(model, question, choice):
    ids = torch.tensor([[*question, *choice]])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return log_probs.gather(1, ids[0, 1:, None])[-len(choice) :].sum().item()


def log_likelihoods(model):
    pairs = zip(QUESTIONS, CHOICES, strict=True)
    return torch.tensor([[log_likelihood(model, question, choice) for choice in row] for question, row in pairs])


@pytest.mark.slow
@pytest.mark.works_with("lm-eval", "`hf` model with `peft=`: log-likelihoods and accuracy equal those by hand")
def test_likelihoods_and_accuracy_are_those_by_hand(tmp_path):
    write_task(tmp_path)
    tiny_llama().save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = adapt(tiny_llama(), mixora.recipe("sira", num_experts=4, top_k=2, rank=2, task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    run_harness(
        tmp_path,
        "--model_args",
        f"pretrained={tmp_path / 'base'},peft={tmp_path / 'adapter'}",
        "--batch_size",
        "4",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "found"),
        "--log_samples",
    )
    expected, of_base = log_likelihoods(model), log_likelihoods(tiny_llama())
    assert (expected - of_base).abs().max() > 0.01
    (file,) = (tmp_path / "found").rglob("samples_*.jsonl")
    samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    found = torch.tensor([[float(response[0][0]) for response in sample["resps"]] for sample in samples])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    (file,) = (tmp_path / "found").rglob("results_*.json")
    accuracy = (expected.argmax(1) == torch.tensor(ANSWERS)).float().mean().item()
    assert json.loads(file.read_text())["results"]["local_choices"]["acc,none"] == pytest.approx(accuracy)
