"""That a training which was asked to shard its model does so: switched on where accelerate leaves it out, or refused.

Without an accelerator, accelerate reads the settings of FSDP2 and trains with DDP, or each process for itself; so does
its DeepSpeed, unless it is told to use the CPU. Nothing of this shows in a loss.
"""

import os
from functools import partial
from typing import Any

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mixora.errors import TrainingError
from mixora.host.sharding import is_sharded
from mixora.mixture import mixtures_of
from mixora.tuner.keys import adapter_state


def shard_on_cpu(trainer: Any) -> None:
    """Have the accelerator of `trainer`, just made, apply FSDP2 on a CPU too, and save no more than the adapter."""
    state, args = trainer.accelerator.state, trainer.args
    if state.distributed_type == DistributedType.MULTI_CPU and _is_fsdp_asked(args):
        plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if plugin.fsdp_version == 2:
            # the second state is what the first is made from again
            state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
            state.fsdp_plugin, trainer.is_fsdp_enabled = plugin, True
    if state.distributed_type == DistributedType.FSDP and trainer.accelerator.is_fsdp2:
        # its own gathers the base as well
        trainer.accelerator.get_state_dict = partial(_state_of, trainer.accelerator)


def _state_of(accelerator: Any, model: nn.Module, unwrap: bool = True) -> dict[str, Any]:
    return adapter_state(accelerator.unwrap_model(model))


def save_adapter(trainer: Any, folder: str | None) -> None:
    """Write the adapter where a trainer that saves sharded states writes none; every process has to call it."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if trainer.is_fsdp_enabled and plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type):
        trainer._save(folder, state_dict=_state_of(trainer.accelerator, trainer.model))


def check_sharding(trainer: Any) -> None:
    """`TrainingError` where `trainer`, ready for its first step, was asked to shard and does not.

    Also where accelerate takes each process for the only one, so that all would train on the same rows.
    """
    asked = find_asked(trainer)
    if asked is None:
        return
    model, processes = trainer.model_wrapped, trainer.accelerator.num_processes
    launched = max(int(os.environ.get("WORLD_SIZE", 1)), dist.get_world_size() if dist.is_initialized() else 1)
    found = _describe(model)
    if processes < launched:
        raise TrainingError(
            f"{asked} was asked for with {launched} processes, but accelerate takes each of them for the only one, so "
            "that all would train on the same rows; valid on a CPU: TrainingArguments(use_cpu=True)"
        )
    if found != asked and not (asked == "FSDP" and found == "FSDP2"):
        raise TrainingError(
            f"{asked} was asked for, but after preparation the model is trained by {found}; "
            f"valid: a launch in which it is sharded ({_advise(asked, processes)}), or settings without {asked}"
        )
    _check_trained(trainer, model)
    if asked.startswith("ZeRO") and any(part.router.draws for m in mixtures_of(model) for part in m.parts.values()):
        raise TrainingError(
            f"{asked}: its optimiser takes a step with all weights of a partition, weight decay and momentum included, "
            "so it would change experts that were not drawn; valid: FSDP2, DDP, or a router that draws no route"
        )


def find_asked(trainer: Any) -> str | None:
    """What the settings ask for: `FSDP` of any version, `FSDP2`, `ZeRO-1` to `ZeRO-3`; None without sharding."""
    args, state = trainer.args, trainer.accelerator.state
    if args.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"):
        plugin = getattr(state, "deepspeed_plugin", None) or args.deepspeed_plugin
        stage = 0 if plugin is None else plugin.zero_stage
        return f"ZeRO-{stage}" if stage else None
    if _is_fsdp_asked(args):
        plugin = getattr(state, "fsdp_plugin", None)
        own = args.fsdp_plugin_args or {"fsdp_version": os.environ.get("FSDP_VERSION", 1)}
        version = own["fsdp_version"] if plugin is None else plugin.fsdp_version
        return "FSDP2" if int(version) == 2 else "FSDP"
    parallelism = args.parallelism_config or getattr(state, "parallelism_config", None)
    return "FSDP2" if parallelism is not None and parallelism.dp_shard_enabled else None


def _is_fsdp_asked(args: Any) -> bool:
    return args.fsdp_plugin_args is not None or _is_set("ACCELERATE_USE_FSDP")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _describe(model: Any) -> str:
    """What trains a prepared model, in the words of `find_asked` where that is sharded."""
    if hasattr(model, "zero_optimization_stage"):
        stage = model.zero_optimization_stage()
        is_apart = stage < 3 or all(hasattr(p, "ds_id") for p in model.parameters())
        return f"ZeRO-{stage}" if stage and is_apart else "DeepSpeed without ZeRO"
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # after a forward pass, the outermost group stays whole
            module.reshard()
    if any(is_sharded(p) for p in model.parameters()):
        return "FSDP2"
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return "FSDP"
    return "DDP, whole on each process" if isinstance(model, DistributedDataParallel) else "one process, whole"


def _advise(asked: str, processes: int) -> str:
    if processes == 1:
        return "two or more processes"
    return "FSDP2, version 2 of accelerate's settings" if asked == "FSDP" else "an accelerator, or use_cpu=True"


def _check_trained(trainer: Any, model: nn.Module) -> None:
    """That no trained parameter was added behind the sharding, whose gradient nothing would average."""
    if _describe(model) != "FSDP2" or getattr(trainer, "is_distributed_loading_by_transformers", False):
        return
    whole = [name for name, p in model.named_parameters() if p.requires_grad and not is_sharded(p)]
    if whole:
        raise TrainingError(
            f"{whole[0]} and {len(whole) - 1} more trained parameters were added after the model was sharded, so "
            "their gradients stay on their process; valid: add adapters first, then shard"
        )


class ShardingCheck(TrainerCallback):
    """Refuses, before the first step, a training that was asked to shard and does not."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """When the model is prepared."""
        check_sharding(self._trainer)
