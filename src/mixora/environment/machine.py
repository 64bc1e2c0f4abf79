"""The machine: system, processor, memory, accelerators, disk."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what makes matrix products in fp32 and bf16 quick
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve", "bf16")


@dataclass(frozen=True)
class Accelerator:
    """A GPU. `capability`: of CUDA. `memory`: bytes."""

    name: str
    kind: str
    memory: int | None
    capability: str | None
    has_bf16: bool


@dataclass(frozen=True)
class Machine:
    """`cores`: that this process may use. `memory`, `memory_free`, `disk_free`: bytes; None where not known."""

    python: str
    system: str
    processor: str
    features: tuple[str, ...]
    cores: int
    memory: int | None
    memory_free: int | None
    disk_free: int
    accelerators: tuple[Accelerator, ...]


def read_machine() -> Machine:
    """What can be found without any package, and the accelerators that torch sees."""
    processor, features = _read_processor()
    memory, free = _read_memory()
    return Machine(
        python=platform.python_version(),
        # not platform.node(), which names the machine
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor,
        features=features,
        cores=count_cores(),
        memory=memory,
        memory_free=free,
        disk_free=shutil.disk_usage(Path.cwd()).free,
        accelerators=_read_accelerators(),
    )


def count_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _lines_of(path: str) -> dict[str, str]:
    """A file of the kernel with a name and a value per line; empty where the system has none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _read_processor() -> tuple[str, tuple[str, ...]]:
    found = _lines_of("/proc/cpuinfo")
    flags = (found.get("flags") or found.get("Features") or "").split()
    name = found.get("model name") or platform.processor() or platform.machine()
    return name, tuple(feature for feature in FEATURES if feature in flags)


def _read_memory() -> tuple[int | None, int | None]:
    found = {name: int(value.split()[0]) * 1024 for name, value in _lines_of("/proc/meminfo").items()}
    total, free = found.get("MemTotal"), found.get("MemAvailable")
    if total is None and hasattr(os, "sysconf"):
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = next(iter(_lines_of("/sys/fs/cgroup/memory.max")), "")
    if limit.isdigit() and total is not None:
        # a container's share
        total = min(total, int(limit))
        free = None if free is None else min(free, total)
    return total, free


def _read_accelerators() -> tuple[Accelerator, ...]:
    try:
        import torch
    except (ImportError, OSError):
        return ()
    if torch.cuda.is_available():
        return tuple(_describe(torch, number) for number in range(torch.cuda.device_count()))
    if torch.backends.mps.is_available():
        return (Accelerator("Apple GPU", "mps", None, None, True),)
    return ()


def _describe(torch: Any, number: int) -> Accelerator:
    properties = torch.cuda.get_device_properties(number)
    kind = "rocm" if torch.version.hip else "cuda"
    capability = f"{properties.major}.{properties.minor}"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return Accelerator(properties.name, kind, properties.total_memory, capability, has_bf16)
