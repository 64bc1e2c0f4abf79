"""Models of Llama's shapes with random weights in bf16: a training step, decoding, and one linear with every kernel.

The 1B shape is measured whole. The 8B shape is measured with few blocks, twice, and a line through the two gives the
whole model: blocks are alike, and what is left (embedding, head, loss) is in both.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import decoding, layers, training_step
from benchmarks.gpu import roofline
from benchmarks.gpu.roofline import Llama, Mixture, Peak
from benchmarks.measuring import Step, compare
from mixora.contracts import Shape
from mixora.kernels import KERNELS

ONE_B = Llama(2048, 8192, 16, heads=32, groups=8, vocabulary=128256, tied=True)
EIGHT_B = Llama(4096, 14336, 32, heads=32, groups=8, vocabulary=128256, tied=False)
# SmolLM2-135M
SMALL = Llama(576, 1536, 30, heads=9, groups=3, vocabulary=49152, tied=True)
TINY = Llama(32, 48, 1, heads=4, groups=2, vocabulary=64, tied=True)
# that of `training_step`: 8 experts of rank 8, 2 of them for a token; joint kernels compute all
EXPERTS, TOP_K, RANK = 8, 2, 8
ALL, CHOSEN = Mixture(EXPERTS * RANK, EXPERTS), Mixture(TOP_K * RANK, EXPERTS)


def make_base(llama: Llama, blocks: int, dtype: torch.dtype, device: str) -> LlamaForCausalLM:
    """The same weights each time, made on the device."""
    torch.manual_seed(0)
    sizes = {"hidden_size": llama.width, "intermediate_size": llama.inner, "vocab_size": llama.vocabulary}
    heads = {"num_attention_heads": llama.heads, "num_key_value_heads": llama.groups}
    config = LlamaConfig(
        **sizes, **heads, num_hidden_layers=blocks, tie_word_embeddings=llama.tied, max_position_embeddings=8192
    )
    config.use_cache = False
    with torch.device(device):
        return LlamaForCausalLM._from_config(config, dtype=dtype)


def make_batch(llama: Llama, rows: int, length: int, device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, llama.vocabulary, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "labels": ids}


def list_kernels(shape: Shape, device: str) -> list[str]:
    """Those that can compute such a linear, but for Triton's interpreter, whose time says nothing."""
    able = [name for name, kernel in KERNELS.items() if kernel.objection(shape, torch.bfloat16) is None]
    return [name for name in able if name != "triton" or device == "cuda"]


def rate(rows: list[dict[str, Any]], parts: list[roofline.Part], peak: Peak | None) -> dict[str, Any]:
    """The rows, each with its fraction of the roofline, and what that was counted from."""
    bound = roofline.summarise(parts, peak)
    if peak is not None:
        rows = [{**row, "roofline_fraction": round(float(bound["bound_ms"]) / row["ms"], 4)} for row in rows]
    return {"roofline": bound, "rows": rows}


def time_training(llama: Llama, blocks: int, batch: tuple[int, int], repeats: int, device: str) -> list[dict[str, Any]]:
    """PEFT's LoRA of rank 16, and ours: `auto` with the fused loss and without it, `loop`, `triton` where it can be."""
    able = list_kernels(Shape(llama.width, llama.width, (RANK,)), device)
    named = [name for name in ("loop", "triton") if name in able]
    given = {"make_base": partial(make_base, llama), "batch": make_batch(llama, *batch, device), "kernels": named}
    return training_step.measure("bfloat16", blocks, repeats, True, device, **given)


def train_whole(llama: Llama, batch: tuple[int, int], repeats: int, device: str, peak: Peak | None) -> dict[str, Any]:
    """All blocks. The roofline is that of our step, with the experts that a token chose."""
    tokens, length = batch[0] * batch[1], batch[1]
    rows = time_training(llama, llama.layers, batch, repeats, device)
    parts = roofline.training_step(llama, llama.layers, tokens, length, CHOSEN)
    return {"blocks": llama.layers, "batch": list(batch), **rate(rows, parts, peak)}


def train_part(
    llama: Llama, few: tuple[int, int], batch: tuple[int, int], repeats: int, device: str, peak: Peak | None
) -> dict[str, Any]:
    """So many blocks of the model, and all of them by extrapolation."""
    tokens, length = batch[0] * batch[1], batch[1]
    measured = {blocks: time_training(llama, blocks, batch, repeats, device) for blocks in few}
    pairs = zip(*measured.values(), strict=True)
    whole = [extrapolate(dict(zip(few, pair, strict=True)), llama.layers) for pair in pairs]
    yardstick = whole[0]
    for row in whole:
        row |= {
            name: round(row[of] / yardstick[of], 3) for name, of in (("ratio", "ms"), ("memory_ratio", "mebibytes"))
        }
    parts = roofline.training_step(llama, llama.layers, tokens, length, CHOSEN)
    extrapolated = {"blocks": llama.layers, "batch": list(batch), **rate(whole, parts, peak)}
    return {
        "measured": [{"blocks": blocks, "rows": rows} for blocks, rows in measured.items()],
        "extrapolated": extrapolated,
    }


def extrapolate(rows: Mapping[int, dict[str, Any]], blocks: int) -> dict[str, Any]:
    """What a line through two measurements gives for so many blocks."""
    (few, low), (more, high) = sorted(rows.items())
    far = (blocks - few) / (more - few)
    figures = {name: round(low[name] + far * (high[name] - low[name]), 3) for name in ("ms", "mebibytes")}
    return {"dtype": low["dtype"], "variant": low["variant"], **figures}


def decode(
    llama: Llama, blocks: int, rows: tuple[int, ...], repeats: int, device: str, peak: Peak | None
) -> list[dict[str, Any]]:
    """A step for so many sequences at once. Its roofline counts the router and the experts a single token chose."""
    found = []
    for count in rows:
        given = {"make_base": partial(make_base, llama)}
        times = decoding.measure("bfloat16", count, blocks, repeats, device, **given)
        # several tokens may choose all experts
        mixture = CHOSEN if count == 1 else ALL
        parts = roofline.decoding_step(llama, blocks, count, decoding.PROMPT + repeats // 2, mixture)
        found.append({"blocks": blocks, "batch": count, **rate(times, parts, peak)})
    return found


def time_linear(width: int, rank: int, tokens: int, repeats: int, device: str, peak: Peak | None) -> dict[str, Any]:
    """One linear with experts and router, forward and backward, with every kernel; beside it PEFT's LoRA."""
    steps = linear_steps(width, rank, tokens, device)
    times = compare(steps, f"PEFT LoRA r={TOP_K * rank}", repeats, device)
    parts = roofline.frozen(tokens, width, width)
    parts += roofline.experts(tokens, width, width, Mixture(TOP_K * rank, EXPERTS))
    facts = {"width": width, "rank": rank, "breadth": EXPERTS * rank / TOP_K, "tokens": tokens}
    return {**facts, **rate([{"variant": name, **found} for name, found in times.items()], parts, peak)}


def linear_steps(width: int, rank: int, tokens: int, device: str) -> dict[str, Step]:
    def make_frozen() -> nn.Module:
        torch.manual_seed(0)
        return (
            layers.Model("linear", nn.Linear(width, width, bias=False)).to(device, torch.bfloat16).requires_grad_(False)
        )

    def make_experts(kernel: str) -> nn.Module:
        router = {"kind": "topk", "num_experts": EXPERTS, "top_k": TOP_K, "renormalise": True}
        rule = {"targets": ["linear"], "expert": {"kind": "lora", "rank": rank}, "router": router, "kernel": kernel}
        return layers.adapt(make_frozen(), rule)

    lora = layers.peft.LoraConfig(r=TOP_K * rank, target_modules=["linear"])
    made: dict[str, Callable[[], nn.Module]] = {
        "frozen": make_frozen,
        f"PEFT LoRA r={TOP_K * rank}": lambda: layers.fill(layers.peft.get_peft_model(make_frozen(), lora)),
    }
    made |= {name: partial(make_experts, name) for name in list_kernels(Shape(width, width, (rank,) * EXPERTS), device)}
    generator = torch.Generator().manual_seed(1)
    x_BTI = torch.randn(1, tokens, width, generator=generator).to(device, torch.bfloat16)
    return {name: _make_step(make(), x_BTI.clone()) for name, make in made.items()}


def _make_step(model: nn.Module, x_BTI: torch.Tensor) -> Step:
    leaves = [x_BTI.requires_grad_(), *(p for p in model.parameters() if p.requires_grad)]
    dy_BTO = torch.ones_like(x_BTI)
    return lambda: torch.autograd.grad(model(x_BTI), leaves, dy_BTO)
