"""On two ranks: one step of a fully sharded model, against the mean of both ranks' without."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mixora
from mixora.mixture import mixtures_of
from tests.models import adapt, tiny_llama, token_ids

IDS = token_ids(4, 8)


def make(kernel):
    settings = {"num_experts": 4, "top_k": 2, "rank": 2, "dropout": 0.0}
    return adapt(tiny_llama(), mixora.recipe("mola", kernel=kernel, **settings))


def backward(model, rank):
    rows = IDS[2 * rank : 2 * rank + 2]
    mixora.compute_loss(model, {"input_ids": rows, "labels": rows})[0].backward()


def find(folder):
    found = {}
    for kernel in ("joint", "stacked"):
        whole, sharded = make(kernel), make(kernel)
        backward(whole, dist.get_rank())
        for layer in sharded.base_model.model.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        backward(sharded, dist.get_rank())
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        gradients = {name: p.grad.full_tensor() for name, p in sharded.named_parameters() if p.grad is not None}
        expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        for gradient in expected.values():
            dist.all_reduce(gradient)
            gradient /= 2
        assert gradients.keys() == expected.keys()
        joined = sum(layer.obstacle is None for layer in mixtures_of(sharded))
        worst = max(float((gradients[name] - expected[name]).abs().max()) for name in expected)
        found[kernel] = torch.tensor([worst, len(expected), joined])
    return found
