"""On two ranks that see the same rows: each rank's losses, equal where both drew the same masks and routes."""

import torch
import torch.distributed as dist
from datasets import Dataset

import mixora
from benchmarks.reliability.data_parallel import arguments_for, collate, make_model
from tests.training.ranks import gather

CASES = {
    "nothing": ("sira", {}),
    "expert dropout": ("sira", {"expert_dropout": 0.5}),
    "dropout of LoRA experts": ("hilo", {"dropout": 0.5}),
    "dropout of bottlenecks": ("pesc", {"rules.ffn.expert.dropout": 0.5}),
    "dropout inside of a feed-forward part": ("mixlora", {"rules.ffn.expert.dropout": 0.5}),
    "routes": ("adamix-lora", {}),
}
# each rank takes four of these rows at a time
ROWS = Dataset.from_list([{"input_ids": [3 + (5 * n + t) % 60 for t in range(9)]} for n in range(4)] * 6)


class Watched(mixora.Trainer):
    """Keeps its own losses, before they are averaged."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.detach()]
        return loss


def find(folder):
    found = {}
    for name, (recipe, changes) in CASES.items():
        # experts that weigh enough, and digits enough, to be seen in a loss
        model = make_model(recipe, changes).double()
        arguments = arguments_for(folder / "draws", max_steps=3, learning_rate=2.0)
        trainer = Watched(model=model, args=arguments, train_dataset=ROWS, data_collator=collate)
        assert dist.get_world_size() == 2, dist.get_world_size()
        trainer.train()
        weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
        found[name] = gather(torch.stack(trainer.losses)), gather(weights)
    return found
