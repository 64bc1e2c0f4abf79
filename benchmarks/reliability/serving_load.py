"""The server under load: many requests at once, among them streams whose client vanishes and bodies that are none.

A process serves a small model with random weights. Each case (a voice, a prompt, a length; greedy) is asked alone
first. Then clients ask at once, whole and in streams; every answer must be the one that was given alone. The server's
resident memory is read after the warm-up and at the end.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from benchmarks.recording import RESULTS, describe_run, write_results

VOICES = ("red", "blue", "tiny")
WORDS = ["lamp", "hall", "kitchen", "attic", "song", "jazz", "folk", "soul", "river", "stone", "cloud", "window"]
KINDS = {"completion": 45, "chat stream": 45, "vanishes": 5, "malformed": 5}
"""Of a hundred requests."""
MALFORMED = (b"", b"{", b"[]", b'{"model": "red"}', b'{"model": "nobody", "prompt": "a"}', b"\xff\xfe", b"[" * 9000)
MOST_GROWTH_MIB = 16.0
CASES = 40


def make_cases(seed: int) -> list[dict[str, Any]]:
    """What is asked: prompts of 1 to 30 words, answers of 1 to 60 tokens."""
    draw = random.Random(seed)
    return [
        {
            "model": draw.choice(VOICES),
            "prompt": " ".join(draw.choices(WORDS, k=draw.randint(1, 30))),
            "max_tokens": draw.randint(1, 60),
            "temperature": 0,
        }
        for _ in range(CASES)
    ]


def as_chat(case: dict[str, Any]) -> dict[str, Any]:
    """The same as a conversation, to be streamed."""
    kept = {name: value for name, value in case.items() if name != "prompt"}
    return {**kept, "messages": [{"role": "user", "content": case["prompt"]}], "stream": True}


class Load:
    """Asks, and counts what comes. `expected`: what each case was answered alone."""

    def __init__(self, client: httpx.AsyncClient, cases: list[dict[str, Any]]) -> None:
        self.client, self.cases = client, cases
        self.expected: list[tuple[str, str]] = []
        self.seconds: list[float] = []
        self.outcomes: Counter[str] = Counter()
        self.tokens = 0

    async def ask_alone(self) -> None:
        for case in self.cases:
            self.expected.append((await self.complete(case), await self.stream(case)))

    async def complete(self, case: dict[str, Any]) -> str:
        response = await self.client.post("/v1/completions", json=case)
        response.raise_for_status()
        found = response.json()
        self.tokens += found["usage"]["completion_tokens"]
        return found["choices"][0]["text"]

    async def stream(self, case: dict[str, Any]) -> str:
        told = []
        async with self.client.stream("POST", "/v1/chat/completions", json=as_chat(case)) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line.removeprefix("data: "))
                    told.append(chunk["choices"][0]["delta"].get("content", ""))
                    self.tokens += 1
        return "".join(told)

    async def vanish(self, case: dict[str, Any]) -> None:
        asked = {**as_chat(case), "max_tokens": 200}
        async with self.client.stream("POST", "/v1/chat/completions", json=asked) as response:
            response.raise_for_status()
            async for _ in response.aiter_lines():
                return

    async def send_malformed(self, number: int) -> bool:
        body = MALFORMED[number % len(MALFORMED)]
        response = await self.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        return response.status_code in (400, 404) and "message" in response.json()["error"]

    async def ask(self, kind: str, number: int) -> None:
        """One request; what came of it is counted."""
        place = number % len(self.cases)
        begun = time.monotonic()
        try:
            if kind == "malformed":
                is_right = await self.send_malformed(number)
            elif kind == "vanishes":
                await self.vanish(self.cases[place])
                is_right = True
            else:
                is_chat = kind == "chat stream"
                said = await (self.stream if is_chat else self.complete)(self.cases[place])
                is_right = said == self.expected[place][is_chat]
                self.seconds.append(time.monotonic() - begun)
            self.outcomes[f"{kind}: {'right' if is_right else 'WRONG'}"] += 1
        except httpx.HTTPError as error:
            self.outcomes[f"{kind}: ERROR {type(error).__name__} {str(error)[:80]}"] += 1


async def run_load(load: Load, requests: int, concurrency: int, seed: int) -> float:
    """So many requests by so many clients; the seconds it took."""
    draw = random.Random(seed)
    kinds = draw.choices(list(KINDS), weights=list(KINDS.values()), k=requests)
    waiting = iter(enumerate(kinds))

    async def work() -> None:
        for number, kind in waiting:
            await load.ask(kind, number)

    begun = time.monotonic()
    await asyncio.gather(*(work() for _ in range(concurrency)))
    return time.monotonic() - begun


def read_memory(process: int) -> float:
    """Resident MiB of a process; Linux tells."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:")) / 1024


async def wait_until_idle(client: httpx.AsyncClient) -> dict[str, float]:
    """The server's own counts, once no slot is in use."""
    for _ in range(500):
        lines = (await client.get("/metrics")).text.splitlines()
        counts = {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}
        if counts["mixora_running"] == counts["mixora_waiting"] == 0:
            return counts
        await asyncio.sleep(0.02)
    raise RuntimeError("a slot is still in use, 10 s after the last client left")


async def measure(url: str, process: int, options: argparse.Namespace) -> dict[str, Any]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=options.concurrency)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        load = Load(client, make_cases(options.seed))
        await load.ask_alone()
        await run_load(load, options.warm_up, options.concurrency, options.seed + 1)
        await wait_until_idle(client)
        warm = read_memory(process)
        load.outcomes.clear()
        load.seconds.clear()
        load.tokens = 0
        seconds = await run_load(load, options.requests, options.concurrency, options.seed + 2)
        counts = await wait_until_idle(client)
        end = read_memory(process)
    latencies = statistics.quantiles(load.seconds, n=100)
    return {
        "outcomes": dict(sorted(load.outcomes.items())),
        "seconds": round(seconds, 1),
        "requests_per_second": round(options.requests / seconds, 1),
        "tokens_per_second": round(load.tokens / seconds),
        "latency_seconds": {"median": round(latencies[49], 3), "99 %": round(latencies[98], 3)},
        "vanished_in_all": counts["mixora_vanished_total"],
        "memory_mib": {"after warm-up": round(warm, 1), "end": round(end, 1), "growth": round(end - warm, 1)},
    }


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reliability.serving_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--warm-up", type=int, default=300)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = read_options(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    facts = describe_run(["python", "-m", "benchmarks.reliability.serving_load", *given])
    words = [sys.executable, "-W", "ignore", "-m", "benchmarks.reliability.serving_service"]
    words += [str(options.slots), str(options.queue)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline())
            found = asyncio.run(measure(f"http://127.0.0.1:{port}", process.pid, options))
        finally:
            process.terminate()
    shape = {name: getattr(options, name) for name in ("requests", "concurrency", "slots", "queue", "warm_up", "seed")}
    found = {**facts, **shape, "most_growth_mib": MOST_GROWTH_MIB, **found}
    found["is_clean"] = all(name.endswith(": right") for name in found["outcomes"])
    found["is_bounded"] = found["memory_mib"]["growth"] <= MOST_GROWTH_MIB
    path = write_results(
        f"reliability-serving{'' if options.slots == 8 else f'-{options.slots}-slots'}", found, options.out
    )
    print(json.dumps(found, indent=1), path, sep="\n")
    return found


if __name__ == "__main__":
    result = main()
    sys.exit(0 if result["is_clean"] and result["is_bounded"] else 1)
