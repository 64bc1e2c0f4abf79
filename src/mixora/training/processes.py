"""Several processes that train together: that they do, what they agree on, and how their random draws differ."""

import hashlib
import os
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from mixora.errors import CheckpointError, TrainingError
from mixora.host.world import count_processes, process_index

COUNTS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""Where launchers write how many processes they start."""
VALID = (
    "mixora train --processes N, torchrun --nproc-per-node N -m mixora train, or accelerate launch --multi_gpu "
    "--num_processes N -m mixora train, which serves without a GPU too; in a script of your own, without a GPU, "
    "TrainingArguments(use_cpu=True)"
)
FOREVER = timedelta(days=365)


def count_asked() -> int:
    """How many processes a launcher says that it started; 1 where none says so."""
    told = [os.environ.get(name, "") for name in COUNTS]
    return max([int(number) for number in told if number.isdigit()], default=1)


def check_processes() -> None:
    """`TrainingError` where several processes were asked for and this one trains alone, or with fewer of them."""
    asked, found = count_asked(), count_processes()
    if found < asked:
        raise TrainingError(
            f"processes: {asked} were started, but {'each trains alone' if found == 1 else f'{found} train together'}; "
            f"valid: {VALID}"
        )
    # all that `accelerate launch --cpu --num_processes N` tells the one process that it starts
    is_lone = "ACCELERATE_MIXED_PRECISION" in os.environ and not any(name in os.environ for name in COUNTS)
    if found == 1 and is_lone and "MASTER_ADDR" in os.environ:
        raise TrainingError(
            "processes: accelerate launch was asked for several, but started one, as it does with --cpu; "
            f"valid: {VALID}"
        )


def check_resumable(checkpoint: Path) -> None:
    """`CheckpointError` where a checkpoint was written by another number of processes."""
    written = max(len(list(checkpoint.glob("rng_state*.pth"))), 1)
    if written != count_processes():
        raise CheckpointError(
            f"{checkpoint}: was written by {written} process{'es' * (written > 1)}, and this run has "
            f"{count_processes()}; valid: as many, with which the batches are the same"
        )


def is_started_first() -> bool:
    """Whether a launcher says that this is the first process, which is known before they have met."""
    return os.environ.get("RANK", "0") == "0"


def is_first() -> bool:
    """Whether this process writes files, prints and evaluates."""
    return process_index() == 0


def wait_for_all() -> None:
    """Until every process has come here, however long one of them evaluates."""
    if count_processes() > 1:
        dist.barrier(_patient_group())


def agree(flag: bool) -> bool:
    """Whether `flag` is set in any process; all must call this."""
    return average({"flag": float(flag)})["flag"] > 0


def average(values: Mapping[str, float]) -> dict[str, float]:
    """The mean of each value over all processes, which must call this with the same names in the same order."""
    if count_processes() == 1 or not values:
        return dict(values)
    sums = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(sums, group=_patient_group())
    return dict(zip(values, (sums / count_processes()).tolist(), strict=True))


_patient: dict[Any, Any] = {}


def _patient_group() -> Any:
    """All processes, by gloo: numbers need no accelerator, and the default group gives up waiting after a time."""
    world = dist.group.WORLD
    if world not in _patient:
        _patient.clear()
        _patient[world] = dist.new_group(backend="gloo", timeout=FOREVER)
    return _patient[world]


class OwnDraws(TrainerCallback):
    """Lets each process draw masks of its own: trainers seed all of them alike.

    Not where the order of the rows is drawn from the same random state.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first process goes on as it would alone; a resumed run reads its states after this."""
        is_apart = getattr(args, "train_sampling_strategy", "random") in ("random", "sequential")
        if process_index() > 0 and is_apart:
            # a generator of the CPU reads the lower 32 bits alone
            digest = hashlib.blake2b(f"{args.seed}/{process_index()}".encode(), digest_size=4).digest()
            torch.manual_seed(int.from_bytes(digest))
