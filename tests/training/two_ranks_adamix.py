"""On two ranks: a few steps of AdaMix; what both drew and hold."""

import torch
import torch.distributed as dist

import mixora
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from tests.training.ranks import gather
from tests.training.setups import make_trainer
from tests.training.test_consistency import make_model


class Watched(mixora.Trainer):
    """Keeps the routes that its passes drew, and disturbs the random state as data of unequal length would."""

    routes: list[list[int]] = []

    def compute_loss(self, model, inputs, *args, **kwargs):
        torch.manual_seed(100 * dist.get_rank() + len(self.routes))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        with tracing(owns_losses=True) as trace, torch.no_grad():
            model.module(**inputs)
        self.routes.append([int(seen.routing.experts_TK[0, 0]) for seen in trace.observations])
        return loss


def find(folder):
    model = make_model(num_experts=8)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    changes = {"max_steps": 3, "learning_rate": 0.1, "weight_decay": 0.1, "ddp_backend": "gloo"}
    trainer = make_trainer(Watched, folder, model=model, **changes)
    assert dist.get_world_size() == 2, dist.get_world_size()
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    weights = torch.cat([p.detach().flatten() for p in trained.values()])
    idle = torch.tensor(sum(torch.equal(p, before[name]) for name, p in trained.items()))
    found = {"routes": gather(torch.tensor(trainer.routes)), "weights": gather(weights), "idle": gather(idle)}
    assert len(mixtures_of(model)) == 4
    return found
