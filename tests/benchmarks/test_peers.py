"""Other libraries: figures of those that run, reasons of those that do not, environments made once."""

import argparse
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import environments, running
from benchmarks.peers import comparison, models, worker
from benchmarks.peers.processes import PeerError, Worker

PINNED = Path(comparison.__file__).parent
# what takes the place of Python in a peer's environment: 10 ms for a LoRA, 25 for anything else
STUB = f"""#!{sys.executable}
import json, sys, time

kind = sys.argv[3]
if kind == "xlora":
    print(json.dumps({{"error": "MemoryError: too much"}}))
    sys.exit()
if kind == "moe_peft_mola":
    sys.exit("ImportError: no such module")
if kind == "moe_peft_loramoe":
    time.sleep(60)
print(json.dumps({{"versions": {{"torch": "9"}}}}), flush=True)
for line in sys.stdin:
    value = {{"time": 10, "memory": 100}}[line.strip()] * (1 if kind == "lora" else 2.5)
    print(json.dumps({{"value": value}}), flush=True)
"""


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


@pytest.fixture
def peers(stub, tmp_path, monkeypatch):
    def run(*words):
        path = running.run("peers", [*words, "--repeats", "2", "--seconds", "2", "--out", str(tmp_path)])
        assert path.with_suffix(".png").is_file()
        return json.loads(path.read_text())

    monkeypatch.setattr(comparison, "make_environment", lambda requirements, folder: stub)
    monkeypatch.setattr(sys, "executable", str(stub))
    return run


def test_ratios_are_to_the_lora_of_the_same_environment_and_to_ours(peers):
    found = peers("--only", "mixlora")
    assert found["failed"] == []
    rows = {row["variant"]: row for row in found["rows"]}
    assert list(rows) == [comparison.OUR_LORA, "mixora, recipe mixlora", comparison.THEIR_LORA, "mixlora"]
    peer = rows["mixlora"]
    assert (peer["ms"], peer["ratio"], peer["ratio_to_our_lora"], peer["memory_ratio"]) == (25, 2.5, 2.5, 2.5)
    assert peer["versions"] == {"torch": "9"} and "inference package" in peer["note"]


def test_what_cannot_run_has_a_reason_and_stops_nothing(peers):
    found = peers("--only", "peft", "moe_peft")
    reasons = {row["variant"]: row["reason"] for row in found["failed"]}
    assert reasons["PEFT X-LoRA"] == "MemoryError: too much"
    assert "ImportError: no such module" in reasons["MoE-PEFT MoLA"]
    assert "limit 2 s" in reasons["MoE-PEFT LoRAMoE"]
    ran = {row["variant"] for row in found["rows"]}
    assert {"PEFT Arrow", "MoE-PEFT MixLoRA", "mixora, recipe mola"} <= ran
    assert not ran & set(reasons)


def test_an_environment_that_cannot_be_made_stops_no_other(peers, stub, monkeypatch):
    def make(requirements, folder):
        if requirements.name == "peft.txt":
            raise subprocess.CalledProcessError(1, ["pip", "install"])
        return stub

    monkeypatch.setattr(comparison, "make_environment", make)
    found = peers("--only", "peft", "mixlora")
    assert [(row["environment"], row["variant"]) for row in found["failed"]] == [("peft", "all of them")]
    assert {row["environment"] for row in found["rows"]} == {"mixlora"}


def test_a_worker_that_ends_says_its_last_words(stub):
    peer = Worker(stub, ["moe_peft_mola"], seconds=5)
    with pytest.raises(PeerError, match=r"ended without an answer .*ImportError: no such module"):
        peer.start()
    peer.close()


def test_an_environment_is_made_once_for_its_versions(tmp_path, monkeypatch):
    made, installed = [], []
    monkeypatch.setattr(environments.venv, "create", lambda folder, **_: made.append(folder) or folder.mkdir())
    monkeypatch.setattr(environments.subprocess, "run", lambda words, **_: installed.append(words))
    requirements = PINNED / "peft.txt"
    for _ in range(2):
        assert environments.make_environment(requirements, tmp_path) == tmp_path / "peft" / "bin" / "python"
    assert made == [tmp_path / "peft"]
    assert [words[-1] for words in installed] == ["torch", str(requirements)]
    (tmp_path / "peft" / "made-from.txt").write_text("torch==1.0\n")
    (tmp_path / "peft").rename(tmp_path / "older")
    environments.make_environment(requirements, tmp_path)
    assert len(made) == 2


@pytest.mark.parametrize("name", comparison.GROUPS)
def test_versions_are_pinned(name):
    lines = (PINNED / f"{name}.txt").read_text().splitlines()
    assert all(line.count("==") == 1 for line in lines)
    wanted = {"peft": "peft==0.21.2", "moe_peft": "moe_peft==2.0.2", "mixlora": "mixlora==0.2.3"}
    assert wanted[name] in lines and any(line.startswith("torch==") for line in lines)
    assert set(comparison.GROUPS[name].theirs.values()) <= set(models.MODELS)


@pytest.fixture
def serve(monkeypatch):
    def serve(step, questions):
        monkeypatch.setattr(worker, "build", lambda options: step)
        monkeypatch.setattr(sys, "stdin", io.StringIO(questions))
        answers = io.StringIO()
        worker.serve(argparse.Namespace(), answers)
        return [json.loads(line) for line in answers.getvalue().splitlines()]

    return serve


def test_a_worker_answers_line_by_line(serve):
    ran = []
    first, time, memory = serve(lambda: ran.append(1), "time\nmemory\n")
    assert {"python", "torch", "transformers", "peft", "mixora"} <= set(first["versions"])
    assert time["value"] >= 0 and memory["value"] == 0
    assert len(ran) == 3


def test_a_worker_tells_what_failed(serve):
    def fail():
        raise RuntimeError("cannot allocate\nmore")

    assert serve(fail, "") == [{"error": "RuntimeError: cannot allocate"}]
