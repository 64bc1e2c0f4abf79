"""FSDP2, ZeRO-2 and ZeRO-3 behind one face: shard a model, prove it, take a step, gather what was trained."""

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import mixora
from mixora.host.sharding import is_under_zero

RATE, DECAY = 1e-3, 0.1


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def make_optimiser(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(trained(model).values()), lr=RATE, weight_decay=DECAY)


class Whole:
    """One process, nothing sharded."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.optimiser = model, make_optimiser(model)

    def step(self, rows: Tensor) -> Tensor:
        loss, _ = mixora.compute_loss(self.model, {"input_ids": rows, "labels": rows})
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad()
        return loss.detach()

    def gather(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in trained(self.model).items()}


class Fsdp2(Whole):
    """`fully_shard` on each block and on the rest."""

    def __init__(self, model: Any, **policy: Any) -> None:
        for block in model.get_base_model().model.layers:
            fully_shard(block, **policy)
        super().__init__(fully_shard(model, **policy))

    def prove(self) -> dict[str, int]:
        """Numbers of all parameters, and those that this process holds."""
        parameters = list(self.model.parameters())
        assert all(isinstance(p, DTensor) for p in parameters)
        held = sum(p.to_local().numel() for p in parameters if isinstance(p, DTensor))
        return {"whole": sum(p.numel() for p in parameters), "held": held}

    def gather(self) -> dict[str, Tensor]:
        return {name: p.full_tensor().detach().clone() for name, p in trained(self.model).items()}


class Zero:
    """DeepSpeed; in stage 3 no parameter is too small to be taken apart."""

    def __init__(self, model: nn.Module, stage: int, rows: int) -> None:
        deepspeed = import_deepspeed()
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
        settings = {"zero_optimization": zero, "train_micro_batch_size_per_gpu": rows}
        settings |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        self.stage, self.model = stage, model
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=make_optimiser(model), config=settings)

    def step(self, rows: Tensor) -> Tensor:
        loss, _ = mixora.compute_loss(self.engine, {"input_ids": rows, "labels": rows})
        self.engine.backward(loss)
        self.engine.step()
        return loss.detach()

    def prove(self) -> dict[str, int]:
        """As for FSDP2; in stage 2, of the trained weights that the optimiser keeps."""
        assert self.engine.zero_optimization_stage() == self.stage
        assert is_under_zero(self.model)
        if self.stage == 2:
            held = sum(partition.numel() for partition in self.engine.optimizer.single_partition_of_fp32_groups)
            return {"whole": sum(p.numel() for p in trained(self.model).values()), "held": held}
        parameters: list[Any] = list(self.model.parameters())
        assert all(p.data.numel() == 0 for p in parameters)
        return {
            "whole": sum(p.ds_numel for p in parameters),
            "held": sum(p.ds_tensor.numel() for p in parameters),
        }

    def gather(self) -> dict[str, Tensor]:
        found = trained(self.model)
        with import_deepspeed().zero.GatheredParameters(list(found.values()) if self.stage == 3 else []):
            return {name: p.detach().clone() for name, p in found.items()}


def import_deepspeed() -> Any:
    """Without its operator for shared memory, whose first use compiles C++ for a minute."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def make_way(way: str, model: nn.Module, rows: int) -> Any:
    """`model` under `fsdp2`, `zero2` or `zero3`, each process with so many rows of a step."""
    return Fsdp2(model) if way == "fsdp2" else Zero(model, int(way[-1]), rows)


def prove(wrapped: Any, processes: int) -> dict[str, int]:
    """The world's size and how much of a model this process holds; an error unless it is its share."""
    assert dist.get_world_size() == processes, dist.get_world_size()
    found: dict[str, int] = {"processes": dist.get_world_size(), **wrapped.prove()}
    # what does not divide evenly is filled up
    assert found["whole"] / processes <= found["held"] < 0.9 * found["whole"] or found["held"] < 0.6 * found["whole"]
    return found
