"""Answers of llama.cpp, in its own environment: `python llama_cpp_worker.py JOB ANSWERS SOURCE`. Greedy, in float32.

`SOURCE`: llama.cpp's source tree, whose converters turn folders into GGUF files.
"""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from llama_cpp import GGML_TYPE_F32, Llama


def main(job_file: str, answers_file: str, source: str) -> None:
    job = json.loads(Path(job_file).read_text())
    folder, converters = Path(answers_file).parent, Path(source)
    whole = {
        name: convert(converters / "convert_hf_to_gguf.py", job[name], folder / f"{name}.gguf")
        for name in ("base", "dense")
    }
    answers = {name: ask(job, whole[name]) for name in whole}
    for name, adapter in job["adapters"].items():
        words = ["--base", job["base"]]
        pairs = convert(converters / "convert_lora_to_gguf.py", adapter, folder / f"lora-{name}.gguf", *words)
        answers[name] = ask(job, whole["base"], lora_path=pairs)
    versions = {"llama-cpp-python": version("llama-cpp-python")}
    Path(answers_file).write_text(json.dumps({"versions": versions, "answers": answers}))


def convert(program: Path, folder: str, out: Path, *words: str) -> str:
    """The GGUF file that one of llama.cpp's programs makes of a folder."""
    command = [sys.executable, str(program), folder, "--outfile", str(out), "--outtype", "f32", *words]
    environment = {**os.environ, "PYTHONPATH": str(program.parent / "gguf-py")}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)
    return str(out)


def ask(job: dict[str, Any], model_path: str, **settings: Any) -> list[dict[str, Any]]:
    """Each prompt by itself, token by token with its cache: the tokens with their log-probabilities."""
    exact = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "flash_attn": False}
    model = Llama(
        model_path, n_ctx=128, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False, **exact, **settings
    )
    found = []
    for prompt in job["prompts"]:
        model.reset()
        model.eval(prompt)
        tokens, log_probabilities = [], []
        for _ in range(job["tokens"]):
            scores = model.scores[model.n_tokens - 1].astype(np.float64)
            tokens.append(int(scores.argmax()))
            log_probabilities.append(float(-np.log(np.exp(scores - scores.max()).sum())))
            model.eval(tokens[-1:])
        found.append({"tokens": tokens, "log_probabilities": log_probabilities})
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
