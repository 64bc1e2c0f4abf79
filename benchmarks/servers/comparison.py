"""Exports of mixora in vLLM and llama.cpp as released, each in an environment of its own, beside transformers and PEFT.

Adapters of several recipes on SmolLM2-135M-Instruct, with random weights, are merged into one LoRA each
(`uniform_rank`), and one into a dense checkpoint. Each server answers three prompts, greedily and in float32, with the
base, every adapter and the dense checkpoint. A token is right where transformers and PEFT, reading the same folder,
would choose it too and give it the same log-probability. Environments are made on demand from the pinned versions in
`benchmarks/servers/*.txt`: vLLM's build for CPUs, and llama.cpp compiled from its source.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environments import FOLDER, make_environment
from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.servers.material import Job, expected_models, make_job, score

HERE = Path(__file__).parent
MOST = 1e-3
"""By which a log-probability may differ."""
ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

Answers = Mapping[str, Sequence[Mapping[str, Any]]]


def ask_server(name: str, job: Job, folder: Path, environments: Path) -> dict[str, Any]:
    """Its versions and answers; `CalledProcessError` where it, or the making of its environment, fails."""
    python = make_environment(HERE / f"{name}.txt", environments)
    job_file, answers = folder / "job.json", folder / f"{name}.json"
    job_file.write_text(json.dumps(job.as_dict()))
    words = [str(job_file), str(answers)]
    if name == "llama_cpp":
        words.append(str(fetch_source(python, environments / "llama_cpp-source")))
    environment = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    subprocess.run([python, HERE / f"{name}_worker.py", *words], check=True, env=environment, stdout=sys.stderr)
    return json.loads(answers.read_text())


def fetch_source(python: Path, folder: Path) -> Path:
    """llama.cpp's tree, which lies in the source distribution of its Python package and holds the converters."""
    if not folder.is_dir():
        (pinned,) = (
            line for line in (HERE / "llama_cpp.txt").read_text().split() if line.startswith("llama-cpp-python")
        )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as place:
            words = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", place, pinned]
            subprocess.run([python, "-m", "pip", *words], check=True, stdout=sys.stderr)
            (archive,) = Path(place).glob("*.tar.gz")
            with tarfile.open(archive) as file:
                file.extractall(Path(place) / "tree", filter="data")
            (Path(place) / "tree").rename(folder)  # whole, or not there
    (source,) = folder.glob("*/vendor/llama.cpp")
    return source


def compare(job: Job, answers: Mapping[str, Answers]) -> list[dict[str, Any]]:
    """A row for each server and checkpoint; `effect`: how far the base is from it, so what a difference means."""
    rows, base = [], None
    for checkpoint, model in expected_models(job):
        base = base or model
        for server, of_server in answers.items():
            rows.append({"server": server, "checkpoint": checkpoint, **judge(job, of_server[checkpoint], model, base)})
    return rows


def judge(job: Job, replies: Sequence[Mapping[str, Any]], model: Any, base: Any) -> dict[str, Any]:
    """Tokens in all and those that `model` would choose, the largest difference of a log-probability, and to `base`."""
    chosen, difference, effect = 0, 0.0, 0.0
    for prompt, reply in zip(job.prompts, replies, strict=True):
        tokens, places = torch.tensor(reply["tokens"]), range(job.tokens)
        expected, plain = (score(one, prompt, reply["tokens"]) for one in (model, base))
        chosen += int((expected.argmax(-1) == tokens).sum())
        given = torch.tensor(reply["log_probabilities"])
        difference = max(difference, (expected[places, tokens] - given).abs().max().item())
        effect = max(effect, (expected[places, tokens] - plain[places, tokens]).abs().max().item())
    total = job.tokens * len(job.prompts)
    is_right = chosen == total and difference <= MOST
    return {"tokens": total, "chosen": chosen, "difference": difference, "effect": effect, "is_right": is_right}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.servers.comparison",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", default=["vllm", "llama_cpp"], choices=["vllm", "llama_cpp"])
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--environments", type=Path, default=FOLDER, help="folder of the virtual environments")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = sys.argv[1:] if arguments is None else arguments
    facts = describe_run(["python", "-m", "benchmarks.servers.comparison", *given])
    with tempfile.TemporaryDirectory() as place:
        job = make_job(Path(place), options.tokens, options.seed)
        found = {name: ask_server(name, job, Path(place), options.environments) for name in options.only}
        rows = compare(job, {name: of_server["answers"] for name, of_server in found.items()})
    versions = {name: of_server["versions"] for name, of_server in found.items()}
    result = {**facts, "seed": options.seed, "most": MOST, "servers": versions, "rows": rows}
    print(*(json.dumps(row) for row in rows), write_results("servers", result, options.out), sep="\n")
    return result


if __name__ == "__main__":
    sys.exit(0 if all(row["is_right"] for row in main()["rows"]) else 1)
