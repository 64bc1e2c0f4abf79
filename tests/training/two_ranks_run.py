"""On two ranks: a run as `mixora train` makes it, and one that a signal to the second rank stops and that goes on."""

import os
import signal

import torch.distributed as dist
from safetensors.torch import load_file
from transformers import TrainerCallback

from mixora.errors import StoppedError
from mixora.training import run as running
from mixora.training.checkpoints import find_checkpoint
from mixora.training.processes import check_resumable
from mixora.training.run_config import read_run
from tests.training.test_run import quiet, settings


def tree_of(folder, out, rows):
    """As many rows in a step whatever the number of processes."""
    changes = {"train__batch_size": rows, "train__learning_rate": 0.1, "evaluate__limit": 2}
    tree = settings(folder / "base", folder / "rows", out, **changes)
    tree["adapter"]["expert_dropout"] = 0.0
    tree["train"]["arguments"] = {"optim": "sgd"}
    return tree


class Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def stop(config):
    """What each rank is told when a signal comes to one during the second step."""
    make = running.make_trainer

    def make_trainer(*given):
        trainer = make(*given)
        trainer.add_callback(Signal())
        return trainer

    running.make_trainer = make_trainer
    try:
        running.fit(config, quiet())
    except StoppedError as stopped:
        return str(stopped)
    finally:
        running.make_trainer = make


def find(folder):
    whole = running.fit(read_run(tree_of(folder, folder / "whole", 2)), quiet())
    parts = read_run(tree_of(folder, folder / "parts", 2))
    message = stop(parts)
    assert "after step 2 of 4" in message, message
    checkpoint, _ = find_checkpoint(folder / "parts")
    check_resumable(checkpoint)
    running.fit(parts, quiet(), resume=True)
    assert (whole is not None) == (dist.get_rank() == 0)
    if whole is None:
        return {}
    return {
        "losses": [line["loss"] for line in whole.history],
        "processes": whole.environment["processes"],
        "weights": load_file(folder / "whole" / "adapter" / "adapter_model.safetensors"),
        "resumed": load_file(folder / "parts" / "adapter" / "adapter_model.safetensors"),
    }
