"""Run by torchrun on two gloo ranks, once for all tests: rank 0 writes what each part finds."""

import sys
from pathlib import Path

import torch.distributed as dist

from tests.training import (
    two_ranks_adamix,
    two_ranks_auxiliary,
    two_ranks_draws,
    two_ranks_fused,
    two_ranks_one_graph,
    two_ranks_recipes,
    two_ranks_run,
)
from tests.training.ranks import leave

PARTS = {
    "adamix": two_ranks_adamix,
    "auxiliary": two_ranks_auxiliary,
    "draws": two_ranks_draws,
    "fused": two_ranks_fused,
    "one graph": two_ranks_one_graph,
    "recipes": two_ranks_recipes,
    "run": two_ranks_run,
}


def main(folder):
    dist.init_process_group("gloo")
    assert dist.get_world_size() == 2, dist.get_world_size()
    leave({name: part.find(folder) for name, part in PARTS.items()}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
