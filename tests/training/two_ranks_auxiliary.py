"""On two ranks: one step of each trainer; its routers' gradients."""

import torch
import torch.distributed as dist
import transformers

import mixora
from tests.training.setups import make_trainer
from tests.training.test_auxiliary_gradient import Catch


def find(folder):
    gradients = {}
    for name, trainer_class in {"transformers": transformers.Trainer, "mixora": mixora.Trainer}.items():
        catch = Catch()
        callbacks = [catch] if name == "mixora" else [catch, mixora.AuxiliaryLossCallback()]
        trainer = make_trainer(trainer_class, f"{folder}/{name}", callbacks=callbacks, ddp_backend="gloo")
        assert dist.get_world_size() == 2, dist.get_world_size()
        trainer.train()
        assert isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
        gradients[name] = catch.gradient
    checked = mixora.check_router_gradient(make_trainer(mixora.Trainer, f"{folder}/check", ddp_backend="gloo"))
    gradients["ratio"] = torch.tensor(checked.ratio)
    return gradients
