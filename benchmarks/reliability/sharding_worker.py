"""Started by torchrun: trains every recipe under every way of sharding and compares with what one process did."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import mixora
from benchmarks.reliability.sharding_ways import Whole, make_way, prove, trained
from mixora.errors import ConfigError

VOCABULARY, ROWS, LENGTH, STEPS = 64, 8, 12, 3
OFF = {"dropout": 0.0, "expert_dropout": 0.0}
BALANCE = {"losses.load_balance.coefficient": 0.0}


def make_base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=4, use_cache=False, **sizes))


def make_config(recipe: str, balance: bool) -> mixora.MixoraConfig:
    """Without what draws for each token, and without a balance loss unless its statistics are those of all rows."""
    changes: dict[str, Any] = {"rank": 8} if recipe == "pesc" else {}
    for name, value in {**OFF, **({} if balance else BALANCE)}.items():
        try:
            mixora.recipe(recipe, **{name: value})
        except ConfigError:
            continue
        changes[name] = value
    return mixora.recipe(recipe, **changes)


def make_model(recipe: str, balance: bool) -> nn.Module:
    """Filled, since what starts at zero would hide an error in what it multiplies."""
    torch.manual_seed(1)
    model = get_peft_model(make_base(), make_config(recipe, balance))
    with torch.no_grad():
        for parameter in trained(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.train()


def train(wrapped: Any, rank: int, processes: int) -> list[float]:
    """The losses of a few steps, over all rows of each."""
    losses, share = [], ROWS // processes
    for step in range(STEPS):
        rows = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(step))
        torch.manual_seed(step)
        loss = wrapped.step(rows[rank * share : (rank + 1) * share])
        if processes > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / processes)
    return losses


def make_reference(recipe: str, balance: bool, folder: Path) -> None:
    """What one process trains, below `folder`: its adapter, its weights and losses."""
    alone = Whole(make_model(recipe, balance))
    losses = train(alone, 0, 1)
    alone.model.save_pretrained(folder / "adapter")
    save_file(alone.gather(), folder / "weights.safetensors")
    (folder / "losses.json").write_text(json.dumps(losses))


def farthest(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert some.keys() == others.keys()
    return max(float((some[name] - others[name]).abs().max()) for name in others)


def are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in others)


def compare(recipe: str, way: str, balance: bool, reference: Path, out: Path) -> dict[str, Any]:
    """One recipe under one way, against the reference; leaves the adapter that all processes saved below `out`."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    wrapped = make_way(way, make_model(recipe, balance), ROWS // processes)
    proof = prove(wrapped, processes)
    losses = train(wrapped, rank, processes)
    weights = wrapped.gather()
    wrapped.model.save_pretrained(out, is_main_process=rank == 0)
    wanted = json.loads((reference / "losses.json").read_text())
    if rank == 0:
        save_file(weights, out / "gathered.safetensors")
    return {
        "recipe": recipe,
        "way": way,
        **proof,
        "losses": max(abs(a - b) for a, b in zip(losses, wanted, strict=True)),
        "weights": farthest(weights, load_file(reference / "weights.safetensors")),
        "loaded": load(way, reference),
    }


def load(way: str, reference: Path) -> bool:
    """Whether the adapter of one process, loaded and then sharded, is that adapter to the last bit."""
    model = mixora.from_pretrained(make_base(), reference / "adapter", is_trainable=True)
    wrapped = make_way(way, model, ROWS // dist.get_world_size())
    prove(wrapped, dist.get_world_size())
    return are_equal(wrapped.gather(), load_file(reference / "weights.safetensors"))


def main(job: Path) -> None:
    settings = json.loads(job.read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    assert dist.get_world_size() == settings["processes"], dist.get_world_size()
    found = []
    for recipe in settings["recipes"]:
        for way in settings["ways"]:
            out = job.parent / f"{recipe}-{way}-{settings['processes']}"
            found.append(compare(recipe, way, settings["balance"], job.parent / recipe, out))
            if dist.get_rank() == 0:
                print(json.dumps(found[-1]), flush=True)
    if dist.get_rank() == 0:
        job.with_suffix(".found.json").write_text(json.dumps(found))
    dist.barrier()
    # destructors of process groups may wait for each other
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
