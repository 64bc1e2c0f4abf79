"""How tests start scripts on two gloo ranks, and how these hand over what they found."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def run_two_ranks(script, folder):
    """What rank 0 of a script left in `found.pt`; the script runs on two gloo ranks."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(root / script), str(folder)],
        env={**os.environ, "PYTHONPATH": f"{root}/src:{root}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
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
