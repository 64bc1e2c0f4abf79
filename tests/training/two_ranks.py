"""Run on two gloo ranks, once for all tests: rank 0 writes what each part finds.

Both come from one process, which imports for them: that takes longer than most parts.
"""

import os
import sys
from pathlib import Path

import torch.distributed as dist
from torch.multiprocessing import start_processes

from tests.training import (
    two_ranks_adamix,
    two_ranks_auxiliary,
    two_ranks_bad_step,
    two_ranks_draws,
    two_ranks_fsdp2,
    two_ranks_fused,
    two_ranks_one_graph,
    two_ranks_recipes,
    two_ranks_run,
    two_ranks_sharded,
)
from tests.training.ranks import leave

PARTS = {
    "adamix": two_ranks_adamix,
    "auxiliary": two_ranks_auxiliary,
    "bad step": two_ranks_bad_step,
    "draws": two_ranks_draws,
    "fsdp2": two_ranks_fsdp2,
    "fused": two_ranks_fused,
    "one graph": two_ranks_one_graph,
    "recipes": two_ranks_recipes,
    "run": two_ranks_run,
    "sharded": two_ranks_sharded,
}


def find_all(rank, folder):
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2, dist.get_world_size()
    leave({name: part.find(folder) for name, part in PARTS.items()}, folder)


if __name__ == "__main__":
    start_processes(find_all, args=(Path(sys.argv[1]),), nprocs=2, start_method="fork")
