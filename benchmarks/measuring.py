"""How benchmarks measure: variants take turns on one thread, memory is what storages hold, figures are medians.

On CUDA, time is that between two events of the stream, memory what torch's allocator gave out at most. Needs torch
alone, since it measures in the environments of other libraries too.
"""

import gc
import statistics
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], object]


def alternate(measures: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each gives by turn; the order within a turn alternates."""
    found: dict[str, list[float]] = {name: [] for name in measures}
    for turn in range(repeats):
        for name in list(measures)[:: -1 if turn % 2 else 1]:
            found[name].append(measures[name]())
    return found


def take_turns(steps: dict[str, Step], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Milliseconds of each step by turn, after one step that does not count."""
    for step in steps.values():
        step()
    gc.disable()
    times = alternate({name: partial(time_step, step, device) for name, step in steps.items()}, repeats)
    gc.enable()
    return times


def time_together(steps: dict[str, Step], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Median milliseconds of each, taking turns."""
    return {name: round(statistics.median(found), 3) for name, found in take_turns(steps, repeats, device).items()}


def relate(found: dict[str, list[float]], yardstick: str, unit: str, ratio: str) -> dict[str, dict[str, Any]]:
    """For each: `unit` and `ratio`, medians, with the quartiles around them.

    A ratio is taken within a turn, to the `yardstick`: what slows a machine for a while slows both.
    """
    related = {}
    for name, own in found.items():
        ratios = [one / other for one, other in zip(own, found[yardstick], strict=True)]
        related[name] = {**_summarise(unit, own), **_summarise(ratio, ratios)}
    return related


def compare(steps: dict[str, Step], yardstick: str, repeats: int, device: str = "cpu") -> dict[str, dict[str, Any]]:
    """For each: `ms` and its `ratio` to the `yardstick`, with quartiles."""
    return relate(take_turns(steps, repeats, device), yardstick, "ms", "ratio")


def compare_memory(
    steps: dict[str, Step], yardstick: str, repeats: int = 1, device: str = "cpu"
) -> dict[str, dict[str, Any]]:
    """For each: `mebibytes` at most and their `memory_ratio` to the `yardstick`, with quartiles."""
    peaks = alternate({name: partial(peak_mebibytes, step, device) for name, step in steps.items()}, repeats)
    return relate(peaks, yardstick, "mebibytes", "memory_ratio")


def tabulate(found: dict[str, dict[str, Any]], **facts: Any) -> list[dict[str, Any]]:
    """A row for each variant, printed."""
    rows = [{**facts, "variant": name, **figures} for name, figures in found.items()]
    for row in rows:
        print("  ".join(_word(key, value) for key, value in row.items() if not key.endswith("_quartiles")), flush=True)
    return rows


def _word(key: str, value: Any) -> str:
    return f"{value:<24}" if isinstance(value, str) else f"{key} {value:g}"


def _summarise(name: str, values: list[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    low, middle, high = (round(value, 3) for value in quartiles)
    return {name: middle, f"{name}_quartiles": [low, high]}


def time_step(step: Step, device: str = "cpu") -> float:
    """Milliseconds: on a CPU of the thread's own time, so that others on the machine disturb little."""
    return _time_on_cuda(step) if device == "cuda" else _time_on_cpu(step)


def _time_on_cpu(step: Step) -> float:
    start = time.thread_time()
    step()
    return 1e3 * (time.thread_time() - start)


def _time_on_cuda(step: Step) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made while it is on; `peak`: the most that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = operator(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
                self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, name: int) -> None:
        self.now -= self.alive.pop(name, 0)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def peak_mebibytes(step: Step, device: str = "cpu") -> float:
    """The most that a step holds at once besides what it reads; on a CPU without the workspace of single operators."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 2)
    with LiveBytes() as live:
        step()
    return round(live.peak / 2**20, 2)
