"""On two ranks: one row is bad, in the half of rank 1; what both found."""

import torch.distributed as dist

import mixora
from mixora.errors import NonFiniteError
from tests.training.poison import LeftOut, PoisonedRow, trained
from tests.training.setups import RARE_TOKEN, make_trainer


def run(folder, callback, skip):
    changes = {"max_steps": 2, "learning_rate": 0.02, "max_grad_norm": 1.0, "ddp_backend": "gloo"}
    trainer = make_trainer(mixora.Trainer, folder, callbacks=[callback], **changes)
    assert dist.get_world_size() == 2, dist.get_world_size()
    trainer.skip_bad_steps = skip
    error = ""
    try:
        trainer.train()
    except NonFiniteError as caught:
        error = str(caught)
    mine = {"errors": error, "steps": [bad.step for bad in trainer.bad_steps], "weights": trained(trainer.model)}
    both = [None, None]
    dist.all_gather_object(both, mine)
    return {name: [each[name] for each in both] for name in mine}


def find(folder):
    cases = {
        "stopped": (PoisonedRow(RARE_TOKEN, {1}), 0),
        "skipped": (PoisonedRow(RARE_TOKEN, {1}), 1),
        "left out": (LeftOut({1}), 0),
    }
    return {name: run(f"{folder}/{name}", *case) for name, case in cases.items()}
