"""How requests for one adapter are best computed together: transformers' ways against `mixora serve`'s engine.

The model is that of `benchmarks.reliability.serving_service`. Prompts of 5 to 60 tokens get 32 tokens each, greedily:
one after the other, in padded batches of `generate`, by `generate_batch` (transformers' continuous batching, its cache
of a fixed size), and by the engine with one slot and with eight. All must give the same tokens.

    OMP_NUM_THREADS=1 python -m benchmarks.batching
"""

import argparse
import json
import queue
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig

from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.serving_service import make_roster
from mixora.answering.answer import Piece
from mixora.answering.roster import Roster
from mixora.answering.rows import Decoder
from mixora.answering.sampling import Sampling
from mixora.endpoint.engine import Engine, Question
from mixora.endpoint.limits import Limits

TOKENS = 32
Prompts = list[list[int]]
Way = Callable[[Roster, Prompts], list[list[int]]]


def generate(size: int) -> Way:
    """transformers' own loop, so many prompts at a time."""

    def run(roster: Roster, prompts: Prompts) -> list[list[int]]:
        found = []
        settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        for begin in range(0, len(prompts), size):
            batch = prompts[begin : begin + size]
            width = max(map(len, batch))
            ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch])
            mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
            with torch.no_grad():
                output = roster.model.generate(input_ids=ids, attention_mask=mask, use_cache=True, **settings)
            found += output[:, width:].tolist()
        return found

    return run


def generate_continuously(roster: Roster, prompts: Prompts) -> list[list[int]]:
    """transformers' continuous batching; without `num_blocks` it takes the machine's memory, in a minute or more."""
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = ContinuousBatchingConfig(page_size=32, num_blocks=64, max_batch_tokens=512)
    outputs = roster.model.get_base_model().generate_batch(
        inputs=prompts, generation_config=settings, continuous_batching_config=cache, progress_bar=False
    )
    return [output.generated_tokens for output in outputs.values()]


def serve(slots: int) -> Way:
    """The engine, without HTTP."""

    def run(roster: Roster, prompts: Prompts) -> list[list[int]]:
        engine = Engine(roster, Limits(slots=slots, queue=len(prompts)))
        inbox: queue.Queue[Any] = queue.Queue()
        found: list[list[int]] = [[] for _ in prompts]
        # the likeliest token is told, since no text is asked for
        sampling = Sampling(TOKENS, top_logprobs=0)
        engine.start()
        for place, prompt in enumerate(prompts):

            def deliver(piece: Any, place: int = place) -> None:
                inbox.put((place, piece))

            engine.submit(Question(roster.voices["red"], prompt, sampling, deliver, time.monotonic() + 600))
        going = len(prompts)
        while going:
            place, piece = inbox.get()
            assert isinstance(piece, Piece), piece
            found[place] += [choice.token for choice in piece.choices]
            going -= piece.finish is not None
        engine.stop()
        return found

    return run


WAYS: dict[str, Way] = {
    "generate, one by one": generate(1),
    "generate, batches of 8": generate(8),
    "generate_batch (transformers' continuous batching)": generate_continuously,
    "engine, 1 slot": serve(1),
    "engine, 8 slots": serve(8),
}


def measure(requests: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each way: the ways take turns, after a turn that does not count."""
    roster = make_roster()
    roster.ends = frozenset({-1})
    roster.activate(roster.voices["red"])
    roster.decoder = Decoder(roster.model, 0)
    draw = random.Random(0)
    prompts = [[draw.randrange(4, 99) for _ in range(draw.randint(5, 60))] for _ in range(requests)]
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    tokens: dict[str, list[list[int]]] = {}
    for turn in range(repeats + 1):
        for name, way in WAYS.items():
            begun = time.perf_counter()
            tokens[name] = way(roster, prompts)
            if turn:
                seconds[name].append(time.perf_counter() - begun)
    want = tokens["generate, one by one"]
    return [
        {
            "way": name,
            "seconds": round(statistics.median(took), 2),
            "tokens_per_second": round(requests * TOKENS / statistics.median(took)),
            "answers_as_one_by_one": sum(one == other for one, other in zip(tokens[name], want, strict=True)),
        }
        for name, took in seconds.items()
    ]


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.batching", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    given = sys.argv[1:] if arguments is None else arguments
    facts = describe_run(["python", "-m", "benchmarks.batching", *given])
    rows = measure(options.requests, options.repeats)
    for row in rows:
        print(json.dumps(row))
    path = write_results("batching", {**facts, "requests": options.requests, "rows": rows}, options.out)
    print(path)
    return path


if __name__ == "__main__":
    main()
