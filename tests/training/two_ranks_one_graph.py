"""On two ranks: steps of AdaMix with both graphs and with one; all weights."""

import torch

import mixora
from tests.training.ranks import gather
from tests.training.setups import make_trainer
from tests.training.test_consistency import make_model


def flatten(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def train(folder, **changes):
    """The weights of both ranks after three steps of two micro-batches."""
    model = make_model(num_experts=4, **changes)
    steps = {"max_steps": 3, "gradient_accumulation_steps": 2, "learning_rate": 0.1, "ddp_backend": "gloo"}
    trainer = make_trainer(mixora.Trainer, folder, model=model, **steps)
    torch.manual_seed(3)
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    return gather(flatten(model))


def find(folder):
    return {
        "weights": train(folder),
        "recomputed": train(folder, **{"losses.consistency.recompute": True}),
        "before": flatten(make_model(num_experts=4)),
    }
