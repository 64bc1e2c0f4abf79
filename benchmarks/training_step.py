"""Time and memory of a training step of a whole model: mixtures against PEFT's LoRA of the same active rank.

    OMP_NUM_THREADS=1 python -m benchmarks.training_step [--dtype D ...] [--layers N] [--repeats N] [--out FILE]

The model has the shape of SmolLM2-135M with random weights; all seven linears of a block are adapted, 8 experts of rank
8 of which 2 serve a token, a router for each linear, a balance loss. The yardstick is PEFT's LoRA of rank 16 as a user
gets it: in bfloat16, weights in bfloat16 under autocast. A step is forward, loss and backward; variants take turns.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import mixora
from benchmarks.measuring import RESULTS, Step, compare, peak_mebibytes, write_results

ROWS, LENGTH, VOCABULARY = 4, 256, 49152
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_base(layers: int, dtype: torch.dtype, device: str = "cpu") -> LlamaForCausalLM:
    """SmolLM2-135M's shape, random weights, the same ones each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(
        **sizes, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=2048, tie_word_embeddings=True
    )
    config.use_cache = False
    return LlamaForCausalLM(config).to(device, dtype)


def make_batch(device: str = "cpu") -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1)).to(device)
    return {"input_ids": ids, "labels": ids}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Small numbers where an adapter starts at zero, so that nothing is skipped."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "mixora_B" in name:
            torch.nn.init.normal_(parameter, std=1e-3)
    return model.train()


def make_lora(base: Any) -> Any:
    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules=LINEARS, task_type="CAUSAL_LM")
    return fill(peft.get_peft_model(base, config))


def make_mixture(base: Any, **changes: Any) -> Any:
    """Recipe `mola` without dropout, as the yardstick has none."""
    settings = {"num_experts": 8, "top_k": 2, "rank": 8, "dropout": 0.0, "losses.load_balance.coefficient": 0.01}
    return fill(peft.get_peft_model(base, mixora.recipe("mola", task_type="CAUSAL_LM", **{**settings, **changes})))


def variants(
    layers: int,
    dtype: torch.dtype,
    device: str = "cpu",
    make_base: Callable[..., Any] = make_base,
    batch: Mapping[str, torch.Tensor] | None = None,
    kernels: Sequence[str] = ("loop",),
) -> Iterator[tuple[str, Step]]:
    """Each with a base of its own. `kernels`: those that are named, besides what `auto` stands for."""
    batch = batch or make_batch(device)

    def make_step(model: Any, fused: bool, is_ours: bool) -> Step:
        trained = [p for p in model.parameters() if p.requires_grad]

        def step() -> object:
            for parameter in trained:
                parameter.grad = None
            with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = mixora.compute_loss(model, batch, fused_loss=fused)[0] if is_ours else model(**batch).loss
            loss.backward()
            return loss.item()

        return step

    yield "PEFT LoRA r=16", make_step(make_lora(make_base(layers, dtype, device)), False, False)
    ours = make_mixture(make_base(layers, dtype, device))
    yield "mixora", make_step(ours, True, True)
    yield "mixora, loss not fused", make_step(ours, False, True)
    for kernel in kernels:
        model = make_mixture(make_base(layers, dtype, device), kernel=kernel)
        yield f"mixora, kernel {kernel}", make_step(model, True, True)


def measure(
    dtype_name: str, layers: int, repeats: int, with_memory: bool, device: str = "cpu", **given: Any
) -> list[dict[str, Any]]:
    """A row for each variant; `given` to `variants`."""
    steps = dict(variants(layers, getattr(torch, dtype_name), device, **given))
    times = compare(steps, "PEFT LoRA r=16", repeats, device)
    peaks = {name: peak_mebibytes(step, device) for name, step in steps.items()} if with_memory else {}
    rows = []
    for name in steps:
        row = {"dtype": dtype_name, "variant": name, **times[name]}
        if with_memory:
            row |= {"mebibytes": peaks[name], "memory_ratio": round(peaks[name] / peaks["PEFT LoRA r=16"], 3)}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / f"training-step-{date.today()}.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row for dtype in options.dtype for row in measure(dtype, options.layers, options.repeats, not options.no_memory)
    ]
    write_results(options.out, "training_step", layers=options.layers, rows=rows)


if __name__ == "__main__":
    main()
