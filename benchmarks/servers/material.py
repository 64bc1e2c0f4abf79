"""What the servers are given: exports of mixora, and what transformers and PEFT compute from them."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import mixora
from mixora.bases import load_base

BASE = "smollm2-135m-instruct"
RECIPES = ("lora", "adamix-lora", "sira", "hilo", "molora")
DENSE = "adamix-lora"
PROMPTS = (
    "The capital of France is",
    "Turn on the lights in the kitchen, then",
    "A recipe for bread: take flour, water, salt and",
)
TEXTS = (
    "Rain fell on the harbour all night, and by morning the boats lay deep in grey water.",
    "To change a tyre, loosen the nuts a little before you lift the car off the ground.",
)


@dataclass(frozen=True)
class Job:
    """What a server loads and answers. `adapters`: folders by name; `prompts`: token ids; `tokens`: of each answer."""

    base: str
    dense: str
    adapters: dict[str, str]
    prompts: list[list[int]]
    tokens: int

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


def make_job(folder: Path, tokens: int, seed: int) -> Job:
    """Write the base, every recipe's LoRA and one dense checkpoint into `folder`; experts have random weights."""
    base = folder / "base"
    model, tokenizer = load_base(BASE)
    for part in (model, tokenizer):
        part.save_pretrained(base)
    batches = [
        {"input_ids": ids, "labels": ids} for ids in (tokenizer(text, return_tensors="pt").input_ids for text in TEXTS)
    ]
    material = mixora.Approximation(batches[:1], batches[1:])
    adapters = {}
    for recipe in RECIPES:
        model = draw_mixture(recipe, base, seed)
        adapters[recipe] = str(folder / recipe)
        is_one = recipe in ("lora", "adamix-lora")
        mixora.merge(model, folder / recipe, uniform_rank=True, approximation=None if is_one else material)
        if recipe == DENSE:
            mixora.merge(model, folder / "dense", to="dense")
            tokenizer.save_pretrained(folder / "dense")
    return Job(str(base), str(folder / "dense"), adapters, [tokenizer(text).input_ids for text in PROMPTS], tokens)


def draw_mixture(recipe: str, base: Path, seed: int) -> nn.Module:
    """The recipe's adapter on the base, with experts that change what it says."""
    torch.manual_seed(seed)
    model = get_peft_model(load_base(str(base))[0], mixora.recipe(recipe, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixora_B" in name:
                parameter.normal_(std=0.02)
    return model


def expected_models(job: Job) -> Iterator[tuple[str, nn.Module]]:
    """By name, what each answer is compared with: the base, each adapter as PEFT reads it, the dense checkpoint."""
    yield "base", _load(job.base)
    for name, folder in job.adapters.items():
        yield name, PeftModel.from_pretrained(_load(job.base), folder).eval()
    yield "dense", _load(job.dense)


def score(model: nn.Module, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """Log-probabilities [len(answer), vocabulary] at the places of the answer's tokens."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def _load(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
