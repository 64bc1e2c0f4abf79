"""What merged adapters cost in inference: AdaMix merged against one LoRA, folded adapters against the frozen base.

Both are to be 1.00, since nothing of the mixture is left. Recipe `adamix-lora` on a model of SmolLM2-135M's shape:

- `merged / one LoRA`: what `mixora.merge` wrote, read by plain PEFT, and AdaMix in evaluation mode, whose experts are
  averaged as it runs; against PEFT's LoRA of the same rank on the same linears.
- `folded / base`: what `merge_and_unload` left, of AdaMix and of recipe `lora`; against the frozen base.

`prefill` reads 1024 tokens, `decode` takes one more token, of one sequence either.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

import mixora
from benchmarks import training_step
from benchmarks.decoding import PROMPT, draw_prompt
from benchmarks.decoding import make_step as make_decoding_step
from benchmarks.measuring import Step, compare, tabulate
from benchmarks.running import add_dtypes
from benchmarks.training_step import fill, make_base

RANK, ALPHA = 4, 32
LORA, BASE = f"PEFT LoRA r={RANK}", "frozen base"
PHASES = ("prefill", "decode")


def make_mixture(recipe: str, layers: int, dtype: torch.dtype, **changes: Any) -> Any:
    config = mixora.recipe(recipe, task_type="CAUSAL_LM", **changes)
    return fill(get_peft_model(make_base(layers, dtype), config)).eval()


def make_lora(layers: int, dtype: torch.dtype) -> Any:
    """On the linears that AdaMix adapts."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return fill(get_peft_model(make_base(layers, dtype), config)).eval()


def export(model: Any, layers: int, dtype: torch.dtype) -> Any:
    """Through the disk, into plain PEFT."""
    with tempfile.TemporaryDirectory() as folder:
        mixora.merge(model, Path(folder) / "merged")
        return PeftModel.from_pretrained(make_base(layers, dtype), Path(folder) / "merged").eval()


def make_models(layers: int, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """By what is compared; the first of each is the yardstick."""
    adamix = make_mixture("adamix-lora", layers, dtype)
    merged = {
        LORA: make_lora(layers, dtype),
        "AdaMix, merged to a LoRA": export(adamix, layers, dtype),
        "AdaMix, evaluation mode": adamix,
    }
    folded = {
        BASE: make_base(layers, dtype).requires_grad_(False).eval(),
        "AdaMix, folded": make_mixture("adamix-lora", layers, dtype).merge_and_unload(),
        "recipe lora, folded": make_mixture("lora", layers, dtype).merge_and_unload(),
    }
    return {"merged / one LoRA": merged, "folded / base": folded}


def make_step(model: Any, phase: str) -> Step:
    if phase == "decode":
        return make_decoding_step(model, draw_prompt(1, PROMPT))
    ids_BS = draw_prompt(1, training_step.ROWS * training_step.LENGTH)

    @torch.no_grad()
    def step() -> object:
        return model(input_ids=ids_BS, use_cache=False, logits_to_keep=1).logits

    return step


def measure(dtype_name: str, layers: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each model and phase; `decode` has as many repeats as told, `prefill` a third."""
    rows = []
    for kind, models in make_models(layers, getattr(torch, dtype_name)).items():
        for phase, turns in zip(PHASES, (max(repeats // 3, 1), repeats), strict=True):
            steps = {name: make_step(model, phase) for name, model in models.items()}
            found = compare(steps, next(iter(steps)), turns)
            rows += tabulate(found, compared=kind, phase=phase, dtype=dtype_name)
    return rows


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dtypes(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=31)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows = [row for dtype in options.dtype for row in measure(dtype, options.layers, options.repeats)]
    return {"layers": options.layers, "target": 1.0, "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    title = f"Inference with merged adapters, {found['layers']} layers: the target is 1.00"
    facts = ("compared", "phase", "dtype")
    return draw_ratios(found["rows"], facts, title, "time / the row at 1.00")
