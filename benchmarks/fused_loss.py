"""Time and memory of the loss behind a frozen head: fused against transformers' own, one pass and two (consistency).

python benchmarks/fused_loss.py [--width 576] [--vocabulary 49152] [--tokens 1024] [--repeats 7] [--threads 1]
"""

import argparse
import itertools
import statistics
import time

import torch
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from mixora import fused_loss
from mixora.losses.consistency import Consistency, ConsistencyConfig

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CHUNKS = (64, 128, 256, 512)
consistency = Consistency(ConsistencyConfig())


def make_inputs(args, dtype):
    """Hidden states of two passes, the head, the labels."""
    torch.manual_seed(0)
    hidden = [torch.randn(args.tokens, args.width).to(dtype).requires_grad_() for _ in range(2)]
    weight = (torch.randn(args.vocabulary, args.width) * 0.05).to(dtype)
    return *hidden, weight, torch.randint(0, args.vocabulary, (args.tokens,))


def run_own(passes, first, second, weight, labels):
    """As transformers computes it, and from the same logits the consistency."""
    first_NC = F.linear(first, weight)
    loss = ForCausalLMLoss(first_NC, None, len(weight), shift_labels=labels)
    if passes == 2:
        loss = loss + consistency.of_items(first_NC, F.linear(second, weight), False).mean()
    loss.backward()


def run_fused(passes, chunk, first, second, weight, labels):
    fused_loss.CHUNK = chunk
    if passes == 1:
        total = fused_loss.cross_entropy(first, weight, labels)
    else:
        total = sum(fused_loss.cross_entropy_and_agreement(first, second, weight, labels))
    (total / len(labels)).backward()


def variants(passes, chunks=CHUNKS):
    yield "transformers", lambda *inputs: run_own(passes, *inputs)
    for chunk in chunks:
        yield f"fused, {chunk} tokens", lambda *inputs, chunk=chunk: run_fused(passes, chunk, *inputs)


def cpu_times(inputs, passes, repeats):
    """Medians over repeats, variants taking turns."""
    times = {name: [] for name, _ in variants(passes)}
    for _ in range(repeats + 1):
        for name, run in variants(passes):
            for hidden in inputs[:2]:
                hidden.grad = None
            start = time.process_time()
            run(*inputs)
            times[name].append(time.process_time() - start)
    return {name: statistics.median(of_name[1:]) for name, of_name in times.items()}


def peak(inputs, run):
    """MiB that `run` takes at most, beside its inputs."""
    for hidden in inputs[:2]:
        hidden.grad = None
    with torch.profiler.profile(profile_memory=True) as profile:
        run(*inputs)
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def main():
    parser = argparse.ArgumentParser()
    numbers = {"width": 576, "vocabulary": 49152, "tokens": 1024, "repeats": 7, "threads": 1}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {vars(args)}; ratio of CPU time to transformers', peak memory beside inputs")
    for dtype in DTYPES:
        inputs = make_inputs(args, DTYPES[dtype])
        for passes in (1, 2):
            times = cpu_times(inputs, passes, args.repeats)
            for name, run in variants(passes):
                ratio, memory = times[name] / times["transformers"], peak(inputs, run)
                print(
                    f"{dtype} passes={passes} {name:18s} {times[name]:.3f} s {ratio:.2f} {memory:.0f} MiB", flush=True
                )


if __name__ == "__main__":
    main()
