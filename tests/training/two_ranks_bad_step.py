"""On two gloo ranks: one row is bad, in the half of rank 1."""

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import mixora
from mixora.errors import NonFiniteError
from tests.training.poison import LeftOut, PoisonedRow, trained
from tests.training.setups import RARE_TOKEN, make_trainer


def run(folder, callback, skip):
    changes = {"max_steps": 2, "learning_rate": 0.02, "max_grad_norm": 1.0, "ddp_backend": "gloo"}
    trainer = make_trainer(mixora.Trainer, folder, callbacks=[callback], **changes)
    trainer.skip_bad_steps = skip
    error = ""
    try:
        trainer.train()
    except NonFiniteError as caught:
        error = str(caught)
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
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
    return {name: run(folder / "bad step" / name, *case) for name, case in cases.items()}
