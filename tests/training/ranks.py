"""How tests start two gloo ranks, and how these hand over what they found."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def run_two_ranks(folder):
    """What rank 0 of `two_ranks.py` left in `found.pt`."""
    root = Path(__file__).parents[2]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.two_ranks", str(folder)],
        cwd=root,
        env={**os.environ, **place, "PYTHONPATH": f"{root}/src:{root}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=True)


def gather(tensor):
    """That of each rank."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def leave(found, folder):
    """Rank 0 writes `found`; both end, without destructors.

    DDP's holds the interpreter's lock while it joins a thread that may wait for it.
    """
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    os._exit(0)
