"""On two ranks: one step with the loss fused and not; both gradients."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import mixora
from mixora.training.fused_head import why_not_fused
from tests.training.setups import make_trainer
from tests.training.test_consistency import Catch, make_model
from tests.training.test_fused_head import CHANGED, adapt


def capped_model():
    torch.manual_seed(0)
    return adapt(CHANGED["softcap"](), targets=["q_proj", "v_proj"])


def step(folder, fused, make=make_model, **changes):
    catch = Catch()
    trainer = make_trainer(mixora.Trainer, folder, model=make(), callbacks=[catch], ddp_backend="gloo", **changes)
    assert dist.get_world_size() == 2, dist.get_world_size()
    trainer.fused_loss = fused
    trainer.train()
    assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    assert (trainer.fused_loss_reason is None) == (fused and make is make_model)
    return torch.cat([catch.gradients[name].flatten() for name in sorted(catch.gradients)])


def reason_of_a_sharded_head():
    model = make_model()
    head = model.get_base_model().lm_head
    shards = distribute_tensor(head.weight.detach(), init_device_mesh("cpu", (2,)), [Shard(0)])
    head.weight = torch.nn.Parameter(shards, requires_grad=False)
    return why_not_fused(model)


def find(folder):
    cases = {
        "plain": {},
        "smoothing": {"label_smoothing_factor": 0.1},
        "accumulation": {"gradient_accumulation_steps": 2},
        "changed logits": {"make": capped_model, "gradient_accumulation_steps": 2},
    }
    found = {
        name: [step(f"{folder}/{name}/{fused}", fused, **changes) for fused in (True, False)]
        for name, changes in cases.items()
    }
    found["sharded"] = reason_of_a_sharded_head()
    return found
