"""What one of N processes does for `benchmarks.reliability.processes`: trains each case with DDP, and times steps.

Started by torchrun, or alone. The first process writes `found.json`, and `weights.safetensors` beside it.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

import mixora
from mixora.errors import ConfigError
from mixora.host.world import count_processes, process_index
from mixora.training.processes import count_asked

VOCABULARY = 64
GLOBAL_BATCH = 8
STEPS = 4
# few tokens beside the experts, so that a process leaves some without any
LENGTHS = (3, 9, 2, 6, 1, 12, 4, 2)
# rows of padding: half of the second step's global batch, which is all that some processes get
EMPTY = range(8, 12)
QUIET = {"dropout": 0.0, "expert_dropout": 0.0}
RECOMPUTED = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
BOTH_LOSSES = {"losses.z_loss.coefficient": 0.5}


def list_cases(quick: bool = False) -> dict[str, dict[str, Any]]:
    """By name: recipe, its changes, the class of the trainer, changes to its arguments."""
    names = mixora.recipe_names()
    cases: dict[str, dict[str, Any]] = {name: {"recipe": name} for name in names}
    foreign = {"recipe": "sira", "trainer": transformers.Trainer, "changes": BOTH_LOSSES}
    cases["sira, z-loss, recomputed, transformers.Trainer"] = {**foreign, "arguments": RECOMPUTED}
    if quick:
        return cases
    for name in names:
        # a loss that compares two passes needs a trainer of ours
        if not mixora.recipe(name).losses["consistency"]["coefficient"]:
            cases[f"{name}, transformers.Trainer"] = {"recipe": name, "trainer": transformers.Trainer}
    cases["sira, drawn order"] = {"recipe": "sira", "arguments": {"train_sampling_strategy": "random"}}
    cases["sira, 2 micro-batches"] = {"recipe": "sira", "arguments": {"gradient_accumulation_steps": 2}}
    cases["sira, z-loss, recomputed"] = {"recipe": "sira", "changes": BOTH_LOSSES, "arguments": RECOMPUTED}
    cases["sira, z-loss, re-entrant, transformers.Trainer"] = {**foreign, "arguments": REENTRANT}
    for kernel in ("loop", "stacked", "sorted", "grouped"):
        cases[f"mola, kernel {kernel}"] = {"recipe": "mola", "changes": {"kernel": kernel, "rank": 8}}
    return cases


def make_model(recipe: str, changes: Mapping[str, Any], width: int = 32) -> PeftModel:
    """A Llama of four layers; what draws masks is off, and the balance weighs enough to show in the weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 4, "num_attention_heads": 4}
    marks = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **marks, use_cache=False))
    wanted = {name: value for name, value in QUIET.items() if _has(recipe, name)}
    if mixora.recipe(recipe).losses["load_balance"]["coefficient"]:
        wanted["losses.load_balance.coefficient"] = 0.5
    if recipe == "pesc":
        wanted["rules.ffn.expert.rank"] = 8
    return get_peft_model(base, mixora.recipe(recipe, task_type="CAUSAL_LM", **{**wanted, **changes}))


def _has(recipe: str, setting: str) -> bool:
    try:
        mixora.recipe(recipe, **{setting: 0.0})
    except ConfigError:
        return False
    return True


def make_rows() -> Dataset:
    draw = torch.Generator().manual_seed(5)
    rows = []
    for n in range(2 * STEPS * GLOBAL_BATCH):
        length = LENGTHS[n % len(LENGTHS)] + 1
        row = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        rows.append({"input_ids": [0] * length if n in EMPTY else row})
    return Dataset.from_list(rows)


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Token 0 is padding."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": ids.where(ids != 0, -100)}


def arguments_for(folder: Path, **changes: Any) -> TrainingArguments:
    """The same global batch whatever the number of processes."""
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": GLOBAL_BATCH // count_asked(),
        "learning_rate": 0.1,
        # Adam divides by the gradient's size, and so makes as much of a rounding error as of a gradient
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    return TrainingArguments(**{**defaults, **changes})


class _Idle:
    """Counts the routings of this process in which some expert got no token."""

    def __init__(self, trainer: Any) -> None:
        self.count = 0
        self._add, trainer.figures.add = trainer.figures.add, self.add

    def add(self, model: Any, trace: Any) -> None:
        self.count += sum(bool((seen.routing.load_E() == 0).any()) for seen in trace.observations)
        self._add(model, trace)


def train(
    folder: Path,
    recipe: str,
    trainer: Any = mixora.Trainer,
    changes: Mapping[str, Any] | None = None,
    arguments: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a case gives: its losses and facts, and the trained weights."""
    model = make_model(recipe, changes or {})
    callbacks = [] if trainer is mixora.Trainer else [mixora.AuxiliaryLossCallback()]
    settings = arguments_for(folder, **(arguments or {}))
    made = trainer(model=model, args=settings, train_dataset=make_rows(), data_collator=collate, callbacks=callbacks)
    idle = _Idle(made) if trainer is mixora.Trainer else None
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    made.train()
    is_wrapped = isinstance(made.model_wrapped, DistributedDataParallel)
    assert is_wrapped == (count_processes() > 1), type(made.model_wrapped)
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    lines = [line for line in made.state.log_history if "loss" in line]
    found = {
        "losses": [line["loss"] for line in lines],
        "balance": [line["load_balance"] for line in lines if "load_balance" in line],
        "moved": max(float((weights[name] - before[name]).abs().max()) for name in weights),
        "idle": None if idle is None else idle.count,
    }
    return found, weights


def time_steps(recipe: str, folder: Path, length: int = 128, steps: int = 8) -> float:
    """Tokens per second of all processes together, the first two steps left out."""
    rows = [{"input_ids": [3 + (n + t) % 60 for t in range(length)]} for n in range(GLOBAL_BATCH * (steps + 2))]
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            times.append(time.perf_counter())

    mixora.Trainer(
        model=make_model(recipe, {}, width=256),
        args=arguments_for(folder, max_steps=steps + 2, logging_strategy="no", optim="adamw_torch"),
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        callbacks=[Clock()],
    ).train()
    return GLOBAL_BATCH * length * steps / (times[-1] - times[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", type=int, required=True, help="how many processes there must be")
    parser.add_argument("--timed", nargs="*", default=[], help="recipes to time")
    parser.add_argument("--cases", nargs="*", help="all unless named")
    options = parser.parse_args()
    cases = list_cases()
    report: dict[str, Any] = {"cases": {}, "tokens_per_second": {}}
    weights: dict[str, torch.Tensor] = {}
    for name in options.cases or cases:
        found, trained = train(options.folder / "run", **cases[name])
        assert count_processes() == options.world, f"{count_processes()} processes, not {options.world}"
        report["cases"][name] = found
        weights |= {f"{name}/{path}": tensor for path, tensor in trained.items()}
    for recipe in options.timed:
        report["tokens_per_second"][recipe] = time_steps(recipe, options.folder / "run")
    report["world"] = count_processes()
    if process_index() == 0:
        save_file(weights, options.folder / "weights.safetensors")
        (options.folder / "found.json").write_text(json.dumps(report))
    if count_processes() > 1:
        torch.distributed.barrier()
    # without destructors: DDP's holds the interpreter's lock while it joins a thread that may wait for it
    os._exit(0)


if __name__ == "__main__":
    main()
