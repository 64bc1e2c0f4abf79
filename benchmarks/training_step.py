"""Time of a training step of a whole model: mixtures against PEFT's LoRA of the same active rank.

The model has the shape of SmolLM2-135M with random weights; all seven linears of a block are adapted, 8 experts of rank
8 of which 2 serve a token, a router for each linear, a balance loss. The yardstick is PEFT's LoRA of rank 16 as a user
gets it: in bfloat16, weights in bfloat16 under autocast. A step is forward, loss and backward; variants take turns.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import Step, compare, compare_memory, tabulate
from benchmarks.running import add_dtypes, run

Loss = Callable[[Any, dict[str, torch.Tensor]], torch.Tensor]
ROWS, LENGTH, VOCABULARY = 4, 256, 49152
YARDSTICK = "PEFT LoRA r=16"
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
    # the environments of other libraries, which make their base here, have no mixora
    import mixora

    settings = {"num_experts": 8, "top_k": 2, "rank": 8, "dropout": 0.0, "losses.load_balance.coefficient": 0.01}
    return fill(peft.get_peft_model(base, mixora.recipe("mola", task_type="CAUSAL_LM", **{**settings, **changes})))


def compute_own_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**batch).loss


def make_step(
    model: Any, dtype: torch.dtype, device: str = "cpu", compute_loss: Loss = compute_own_loss, batch: Any = None
) -> Step:
    """Forward, loss and backward, in bfloat16 under autocast; gives the loss."""
    batch = batch or make_batch(device)
    trained = [p for p in model.parameters() if p.requires_grad]

    def step() -> object:
        for parameter in trained:
            parameter.grad = None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = compute_loss(model, batch)
        loss.backward()
        return loss.item()

    return step


def compute_mixture_loss(model: Any, batch: dict[str, torch.Tensor], fused: bool = True) -> torch.Tensor:
    """With the losses of the routers."""
    import mixora

    return mixora.compute_loss(model, batch, fused_loss=fused)[0]


def variants(
    layers: int,
    dtype: torch.dtype,
    device: str = "cpu",
    make_base: Callable[..., Any] = make_base,
    batch: Any = None,
    kernels: Sequence[str] = ("loop",),
) -> Iterator[tuple[str, Step]]:
    """Each with a base of its own, but for what differs in the loss alone.

    `kernels`: those that are named, besides what `auto` stands for.
    """

    def adapt(kernel: str = "auto") -> Any:
        return make_mixture(make_base(layers, dtype, device), kernel=kernel)

    def take_step(model: Any, compute_loss: Loss = compute_mixture_loss) -> Step:
        return make_step(model, dtype, device, compute_loss, batch)

    yield YARDSTICK, take_step(make_lora(make_base(layers, dtype, device)), compute_own_loss)
    ours = adapt()
    yield "mixora", take_step(ours)
    yield "mixora, loss not fused", take_step(ours, partial(compute_mixture_loss, fused=False))
    for kernel in kernels:
        yield f"mixora, kernel {kernel}", take_step(adapt(kernel))


def measure(
    dtype_name: str, layers: int, repeats: int, with_memory: bool, device: str = "cpu", **given: Any
) -> list[dict[str, Any]]:
    """A row for each variant; `given` to `variants`."""
    steps = dict(variants(layers, getattr(torch, dtype_name), device, **given))
    found = compare(steps, YARDSTICK, repeats, device)
    if with_memory:
        peaks = compare_memory(steps, YARDSTICK, device=device)
        found = {name: {**figures, **peaks[name]} for name, figures in found.items()}
    return tabulate(found, dtype=dtype_name)


def add_options(parser: argparse.ArgumentParser) -> None:
    add_dtypes(parser)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=5)


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    rows = [row for dtype in options.dtype for row in measure(dtype, options.layers, options.repeats, False)]
    return {"layers": options.layers, "rows": rows}


def draw(found: dict[str, Any]) -> Any:
    from benchmarks.plotting import draw_ratios

    return draw_ratios(found["rows"], ("dtype",), f"Training step, {found['layers']} layers", f"time / {YARDSTICK}")


if __name__ == "__main__":
    run("step")
