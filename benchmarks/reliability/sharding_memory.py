"""Memory of one process of a sharded training on a CPU: bytes of parameters and optimiser, and resident size.

A model of 8 layers, 512 wide, with recipe `sira` takes two steps of AdamW in fp32. Bytes are those of the storages that
the process holds between two steps; the resident size is what the process grew by since before the model was made. Each
process makes the whole base first, which sharding frees.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import mixora
from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.sharding_ways import Whole, make_way, trained

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8, "num_key_value_heads": 8}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=4096, num_hidden_layers=8, use_cache=False, **SIZES))
    changes = {"expert_dropout": 0.0, "losses.load_balance.coefficient": 0.0}
    return get_peft_model(base, mixora.recipe("sira", **changes)).train()


def held_by(tensor: Any) -> Tensor:
    """What this process keeps of a parameter or of a state of the optimiser."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def count_bytes(tensors: Any) -> int:
    """Of distinct storages: parameters may be views of one buffer."""
    storages = {held.untyped_storage().data_ptr(): held.untyped_storage().nbytes() for held in map(held_by, tensors)}
    return sum(storages.values())


def states_of(wrapped: Any) -> list[Tensor]:
    """Of the optimiser: moments, and the copies of the weights that DeepSpeed's keeps."""
    engine = getattr(wrapped, "engine", None)
    optimiser = wrapped.optimiser if engine is None else engine.optimizer
    inner = getattr(optimiser, "optimizer", optimiser)
    kept = [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
    return kept if engine is None else kept + [p for group in inner.param_groups for p in group["params"]]


def measure(way: str) -> dict[str, Any]:
    process = psutil.Process()
    gc.collect()
    before = process.memory_info().rss
    model = make_model()
    numbers = {"parameters": sum(p.numel() for p in model.parameters()), "trained": 0}
    numbers["trained"] = sum(p.numel() for p in trained(model).values())
    wrapped = Whole(model) if way == "whole" else make_way(way, model, 1)
    rows = torch.randint(4096, (1, 64), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        wrapped.step(rows)
    gc.collect()
    return {
        **numbers,
        "bytes of parameters": count_bytes(wrapped.model.parameters()),
        "bytes of the optimiser": count_bytes(states_of(wrapped)),
        "resident": process.memory_info().rss - before,
        "resident peak": peak_resident() - before,
    }


def peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) * 1024


def work(way: str, out: Path) -> None:
    """In each process of a launch; the first writes what it found."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measure(way)
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"way": way, "processes": dist.get_world_size(), **found}))
    dist.barrier()
    os._exit(0)


def launch(way: str, processes: int, folder: Path) -> dict[str, Any]:
    out = folder / "found.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    own = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions")}
    done = subprocess.run(
        [*command, __file__, "--work", way, "--out", str(out)],
        env={**os.environ, **own},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reliability.sharding_memory", description=__doc__)
    parser.add_argument("--ways", nargs="+", default=["fsdp2", "zero2", "zero3"])
    parser.add_argument("--processes", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.work:
        work(options.work, options.out)
    facts, rows = describe_run(["python", "-m", "benchmarks.reliability.sharding_memory", *sys.argv[1:]]), []
    with tempfile.TemporaryDirectory() as name:
        jobs = [("whole", 1), *((way, processes) for way in options.ways for processes in options.processes)]
        for way, processes in jobs:
            rows.append(launch(way, processes, Path(name)))
            print(rows[-1], flush=True)
    print(write_results("reliability-sharding-memory", {**facts, "rows": rows}, options.out))


if __name__ == "__main__":
    run()
