"""Time of a decoding step of a whole model with a KV cache: mixtures against PEFT's LoRA of the same active rank.

    OMP_NUM_THREADS=1 python -m benchmarks.decoding [--dtype D ...] [--batch N ...] [--layers N] [--repeats N]

Models are those of `benchmarks.training_step`, in evaluation mode, base weights in the dtype and no autocast. A prompt
of 64 tokens fills the cache; a step then takes one more token for each sequence, greedily. Variants take turns.
"""

import argparse
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks.measuring import RESULTS, Step, compare, write_results
from benchmarks.training_step import make_base, make_lora, make_mixture

PROMPT = 64


def variants(
    layers: int, dtype: torch.dtype, batch: int, device: str = "cpu", make_base: Callable[..., Any] = make_base
) -> Iterator[tuple[str, Step]]:
    """Each with a base of its own."""

    def make() -> Any:
        return make_base(layers, dtype, device)

    def make_step(model: Any) -> Step:
        model.eval()
        generator = torch.Generator().manual_seed(1)
        prompt_BS = torch.randint(0, model.config.vocab_size, (batch, PROMPT), generator=generator).to(device)
        cache = DynamicCache()

        @torch.no_grad()
        def advance(ids_BS: torch.Tensor) -> torch.Tensor:
            logits_BSV = model(input_ids=ids_BS, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits_BSV[:, -1:].argmax(dim=-1)

        token_B1 = advance(prompt_BS)

        def step() -> None:
            nonlocal token_B1
            token_B1 = advance(token_B1)

        return step

    yield "frozen base", make_step(make())
    yield "PEFT LoRA r=16", make_step(make_lora(make()))
    yield "mixora", make_step(make_mixture(make()))
    yield "mixora, kernel loop", make_step(make_mixture(make(), kernel="loop"))


def measure(
    dtype_name: str, batch: int, layers: int, repeats: int, device: str = "cpu", **given: Any
) -> list[dict[str, Any]]:
    """A row for each variant; `given` to `variants`."""
    steps = dict(variants(layers, getattr(torch, dtype_name), batch, device, **given))
    rows = []
    for name, found in compare(steps, "PEFT LoRA r=16", repeats, device).items():
        row = {"dtype": dtype_name, "batch": batch, "variant": name, **found}
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--out", type=Path, default=RESULTS / f"decoding-{date.today()}.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        row
        for dtype in options.dtype
        for batch in options.batch
        for row in measure(dtype, batch, options.layers, options.repeats)
    ]
    write_results(options.out, "decoding", layers=options.layers, rows=rows)


if __name__ == "__main__":
    main()
