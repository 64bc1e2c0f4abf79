"""The footprint that `mixora plan` counts, beside what processes really allocate and send.

Each case trains a small Llama with random weights for two steps, on one process or on several that talk by gloo. Memory
is what torch's allocator gave out on the first process at most in the second step (weights, optimiser and the workspace
of operators included). Under ZeRO-3 it is what storages held, without that workspace: there tensors are let go of on
other threads too, where the allocator's record does not look. Bytes sent are those of the collectives that were called,
and of the processes' own counters.
"""

import argparse
import gc
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from peft import get_peft_model
from torch import distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import mixora
from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.footprint_counts import AllocatedBytes, Collectives, StoredBytes
from mixora.footprint import STRATEGIES, Single, estimate
from mixora.training.planning import LOSSES

VOCABULARY = 8192


@dataclass(frozen=True)
class Case:
    """One training step."""

    recipe: str
    strategy: str = "single"
    dtype: str = "float32"
    batch: int = 2
    length: int = 128
    recomputes: bool = False
    fused: bool = True
    layers: int = 4


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("lora"), Case("sira", "fsdp2")]
    single = [Case(recipe) for recipe in ("lora", "sira", "mola", "molora", "pesc", "mixlora", "adamix")]
    single += [Case("sira", dtype="bfloat16"), Case("pesc", dtype="bfloat16"), Case("sira", batch=8, length=256)]
    single += [Case("sira", fused=False), Case("mola", recomputes=True), Case("sira", batch=1, length=64)]
    single += [Case("sira", recomputes=True, fused=False, batch=4, length=256)]
    return single + [
        Case(recipe, strategy, **changes)
        for strategy in STRATEGIES
        for recipe, changes in (
            ("lora", {}),
            ("mola", {"recomputes": True}),
            ("sira", {"batch": 4, "length": 256}),
        )
    ]


def make_model(case: Case, device: str = "cpu") -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 688, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, num_hidden_layers=case.layers, vocab_size=VOCABULARY, use_cache=False)
    with torch.device(device):
        base = LlamaForCausalLM(config).to(getattr(torch, case.dtype))
    model = get_peft_model(base, mixora.recipe(case.recipe, task_type="CAUSAL_LM")).train()
    if case.recomputes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def take_step(case: Case, model: Any, optimizer: Any) -> None:
    LOSSES[case.fused](model, make_batch(case)).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_batch(case: Case) -> dict[str, torch.Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    ids = torch.randint(0, VOCABULARY, (case.batch, case.length), generator=torch.Generator().manual_seed(rank))
    return {"input_ids": ids, "labels": ids}


def train_plainly(case: Case, wrap: Callable[[Any], Any] = lambda model: model) -> Callable[[], None]:
    model = wrap(make_model(case))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    return lambda: take_step(case, model, optimizer)


def train_with_ddp(case: Case) -> Callable[[], None]:
    return train_plainly(case, torch.nn.parallel.DistributedDataParallel)


def train_with_fsdp2(case: Case) -> Callable[[], None]:
    from torch.distributed.fsdp import fully_shard

    def shard(model: Any) -> Any:
        whole = sum(p.numel() for p in model.parameters())
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
        kept = sum(p.to_local().numel() for p in model.parameters())
        assert kept <= 0.51 * whole, f"not sharded: {kept} of {whole}"
        return model

    return train_plainly(case, shard)


def train_with_deepspeed(case: Case) -> Callable[[], None]:
    import deepspeed

    # else it compiles an operator of its own, which changes no figure
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = make_model(case)
    whole = sum(p.nbytes for p in model.parameters())
    trained = [p for p in model.parameters() if p.requires_grad]
    width = model.config.hidden_size
    zero = {"stage": int(case.strategy[-1]), "reduce_bucket_size": width**2, "overlap_comm": False}
    if zero["stage"] == 3:
        # what transformers' Trainer sets for `auto`
        zero |= {"stage3_prefetch_bucket_size": int(0.9 * width**2), "stage3_param_persistence_threshold": 10 * width}
    settings = {
        "train_micro_batch_size_per_gpu": case.batch,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": case.dtype == "bfloat16"},
    }
    optimizer = torch.optim.AdamW(trained, fused=True)
    engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer, model_parameters=trained)
    if zero["stage"] == 3:
        kept = sum(p.ds_tensor.nbytes for p in model.parameters())
        assert kept <= 0.51 * whole, f"not sharded: {kept} of {whole}"

    def step() -> None:
        engine.backward(LOSSES[case.fused](engine, make_batch(case)))
        engine.step()

    return step


TRAINERS = {"single": train_plainly, "ddp": train_with_ddp, "fsdp2": train_with_fsdp2}
TRAINERS |= dict.fromkeys(("zero2", "zero3"), train_with_deepspeed)


def measure(case: Case) -> dict[str, Any]:
    # what an earlier case left is not to be freed in this one
    gc.collect()
    with StoredBytes() if case.strategy == "zero3" else AllocatedBytes() as taken:
        step = TRAINERS[case.strategy](case)
        step()
        with Collectives() as collectives:
            before = count_sent()
            with taken.window():
                step()
            sent = count_sent() - before
    return {"peak": taken.peak(), "collectives": collectives.bytes, "sent": sent}


def count_sent() -> int:
    """Bytes that went through the loopback device so far, from every process of the machine."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split()[9])
    return 0


def compare(case: Case, processes: int, found: dict[str, Any]) -> dict[str, Any]:
    kind = STRATEGIES.get(case.strategy, Single)
    losses = LOSSES if case.fused else {True: LOSSES[False], False: LOSSES[False]}
    [own] = estimate(make_model(case, "meta"), case.batch, case.length, losses, [kind], processes)
    error = own.memory.peak / found["peak"] - 1
    row = {
        **asdict(case),
        "processes": processes,
        "measured_peak": found["peak"],
        "estimated_peak": own.memory.peak,
        "error": round(error, 4),
        "traffic": asdict(own.traffic),
        "collectives": found["collectives"],
        "sent_by_all": found["sent"],
    }
    label = " ".join(f"{key}={value}" for key, value in asdict(case).items())
    print(
        f"{label}: {found['peak'] / 2**20:.2f} MiB, estimated {own.memory.peak / 2**20:.2f}, {error:+.1%}", flush=True
    )
    if processes > 1:
        print(f"   sent {found['sent'] / processes:.0f}, estimated {own.traffic}, {found['collectives']}", flush=True)
    return row


def work(rank: int, processes: int, port: int, case: Case, out: str) -> None:
    torch.set_num_threads(1)
    # DeepSpeed reads it though the group exists already
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    assert dist.get_world_size() == processes
    mixora.import_face()
    found = measure(case)
    if rank == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def measure_together(case: Case, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = os.path.join(folder, "found.pt")
        # forked, so that each case has a process of its own without importing everything anew
        mp.start_processes(work, (processes, port, case, out), processes, start_method="fork")
        found: dict[str, Any] = torch.load(out, weights_only=True)
        return found


def measure_all(quick: bool, processes: int, strategies: list[str]) -> list[dict[str, Any]]:
    measured: list[tuple[Case, int, dict[str, Any]]] = []
    for strategy in strategies:
        chosen = [case for case in cases(quick) if case.strategy == strategy]
        number = 1 if strategy == "single" else processes
        # before any estimate: processes are forked, which autograd's own threads would not survive
        found = [measure_together(case, number) for case in chosen]
        measured += [(case, number, of_case) for case, of_case in zip(chosen, found, strict=True)]
    return [compare(*of_case) for of_case in measured]


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reliability.footprint", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two cases only")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--strategies", nargs="+", default=["single", *STRATEGIES], choices=["single", *STRATEGIES])
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    mixora.import_face()
    measured = [name for name in options.strategies if name in ("single", "ddp", "fsdp2") or find_spec("deepspeed")]
    facts = describe_run(["python", "-m", "benchmarks.reliability.footprint", *sys.argv[1:]])
    rows = measure_all(options.quick, options.processes, measured)
    worst = max(abs(row["error"]) for row in rows)
    print(f"worst error {worst:.1%}")
    print(write_results("reliability-footprint", {**facts, "worst_error": worst, "rows": rows}, options.out))


if __name__ == "__main__":
    main()
