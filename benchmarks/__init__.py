"""Benchmarks of time and memory: `mixora bench NAME`. They come with the repository, not with the package."""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """`module`: of this package. `line`: what it measures."""

    module: str
    line: str


BENCHMARKS = {
    "step": Benchmark("training_step", "time of a training step of a whole model, against PEFT's LoRA"),
    "memory": Benchmark("memory", "peak memory of the same steps"),
    "decode": Benchmark("decoding", "time of a decoding step with a cache, against PEFT's LoRA and the frozen base"),
    "serving": Benchmark("serving", "merged AdaMix against one LoRA, folded adapters against the base"),
    "layers": Benchmark("layers", "PESC's layer, MixLoRA's feed-forward part and AdaMix's step"),
    "scaling": Benchmark("scaling", "one linear as experts, tokens or the share of one expert grow"),
    "kernels": Benchmark("kernels", "every kernel over R / K, and the limits of `auto` that follow"),
    "loss": Benchmark("fused_loss", "the loss behind a frozen head, fused and as transformers computes it"),
    "peers": Benchmark("peers.comparison", "a training step with PEFT, MoE-PEFT and mixlora, each as released"),
}
