"""What a step allocates, stores and sends, counted while it runs on this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measuring import LiveBytes


class AllocatedBytes:
    """What torch's allocator on the CPU gave out and took back on this thread, as its profiler tells it."""

    def __init__(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profile = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)

    def __enter__(self) -> "AllocatedBytes":
        self._profile.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._profile.__exit__(*error)

    def window(self) -> torch.profiler.record_function:
        """What is open while it counts."""
        return torch.profiler.record_function("window")

    def peak(self) -> int:
        """The most that was out at once in the window."""
        events = sorted(self._profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
        window = next(event for event in events if event.name() == "window")
        start, end, now, peak = window.start_ns(), window.start_ns() + window.duration_ns(), 0, 0
        for event in events:
            if event.name() == "[memory]":
                now += event.nbytes()
                peak = max(peak, now) if start <= event.start_ns() <= end else peak
        return peak


class StoredBytes:
    """The bytes of storages that were made since it was opened, until they are gone, on whatever thread."""

    def __init__(self) -> None:
        self._live = LiveBytes()

    def __enter__(self) -> "StoredBytes":
        self._live.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.__exit__(*error)

    @contextmanager
    def window(self) -> Iterator[None]:
        """What is open while it counts."""
        self._live.peak = self._live.now
        yield

    def peak(self) -> int:
        """The most that storages held at once since the window was opened."""
        return self._live.peak


class Collectives(TorchDispatchMode):
    """Bytes that collectives went over, by name: of what is reduced, or of what was gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.__name__.split(".")[0]
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]
            self.bytes[name] = self.bytes.get(name, 0) + max((t.nbytes for t in tensors), default=0)
        return func(*args, **(kwargs or {}))
