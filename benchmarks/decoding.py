"""Time of a decoding step of a whole model with a KV cache: mixtures against PEFT's LoRA of the same active rank.

Models are those of `step`, in evaluation mode, base weights in the dtype and no autocast. A prompt of 64 tokens fills
the cache; a step then takes one more token for each sequence, greedily.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import DynamicCache

from benchmarks import training_step
from benchmarks.measuring import Step, compare, tabulate
from benchmarks.running import add_dtypes, run
from benchmarks.training_step import YARDSTICK, make_base, make_lora, make_mixture

PROMPT = 64


def draw_prompt(batch: int, length: int, device: str = "cpu", vocabulary: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, vocabulary or training_step.VOCABULARY, (batch, length), generator=generator).to(device)


def make_step(model: Any, prompt_BS: torch.Tensor) -> Step:
    """One more token for each sequence."""
    model.eval()
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


def variants(
    layers: int, dtype: torch.dtype, batch: int, device: str = "cpu", make_base: Callable[..., Any] = make_base
) -> Iterator[tuple[str, Step]]:
    """Each with a base of its own."""

    def make() -> Any:
        return make_base(layers, dtype, device)

    frozen = make().requires_grad_(False)
    prompt_BS = draw_prompt(batch, PROMPT, device, frozen.config.vocab_size)
    yield "frozen base", make_step(frozen, prompt_BS)
    yield YARDSTICK, make_step(make_lora(make()), prompt_BS)
    yield "mixora", make_step(make_mixture(make()), prompt_BS)
    yield "mixora, kernel loop", make_step(make_mixture(make(), kernel="loop"), prompt_BS)


def measure(
    dtype_name: str, batch: int, layers: int, repeats: int, device: str = "cpu", **given: Any
) -> list[dict[str, Any]]:
    """A row for each variant; `given` to `variants`."""
    steps = dict(variants(layers, getattr(torch, dtype_name), batch, device, **given))
    return tabulate(compare(steps, YARDSTICK, repeats, device), dtype=dtype_name, batch=batch)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dtypes(parser)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=31)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows = [
        row
        for dtype in options.dtype
        for batch in options.batch
        for row in measure(dtype, batch, options.layers, options.repeats)
    ]
    return {"layers": options.layers, "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    return draw_ratios(
        found["rows"], ("dtype", "batch"), f"Decoding step, {found['layers']} layers", f"time / {YARDSTICK}"
    )


if __name__ == "__main__":
    run("decode")
