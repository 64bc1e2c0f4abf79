"""How scripts that torchrun starts on two gloo ranks hand over what they found."""

import os

import torch
import torch.distributed as dist


def leave(found, folder):
    """Rank 0 writes `found`; both end, without destructors.

    DDP's holds the interpreter's lock while it joins a thread that may wait for it.
    """
    if dist.get_rank() == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    os._exit(0)
