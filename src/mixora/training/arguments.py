"""A run's settings as the trainer's arguments."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from mixora.errors import ConfigError
from mixora.training.processes import count_asked
from mixora.training.run_config import RunConfig
from mixora.training.run_folder import CHECKPOINTS


def make_arguments(config: RunConfig) -> TrainingArguments:
    """The trainer's arguments as `config` says; `ConfigError` for those that transformers refuses."""
    given = config.train.arguments
    _check_types(given)
    try:
        arguments = TrainingArguments(**{**_name_arguments(config), **given})
    except Exception as error:
        # each argument has a check of its own
        raise ConfigError(f"train.arguments: {error}") from None
    _check_effective(arguments)
    return arguments


def _name_arguments(config: RunConfig) -> dict[str, Any]:
    """The settings of a run by the names that they have with transformers."""
    settings = config.train
    return {
        "output_dir": str(Path(config.out) / CHECKPOINTS),
        "max_steps": settings.steps or -1,
        # what is drawn from tasks is as long as the run and in its order
        "num_train_epochs": settings.epochs if config.data.tasks is None else 1,
        "train_sampling_strategy": "random" if config.data.tasks is None else "sequential",
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": settings.gradient_accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": settings.warmup_steps,
        "seed": settings.seed,
        "logging_steps": settings.log_every,
        "save_strategy": "steps" if settings.save_every else "no",
        "save_steps": settings.save_every or 1,
        "save_total_limit": None if settings.keep_checkpoints else 2,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "label_names": ["labels"],
        # packed rows come without a mask
        "include_num_input_tokens_seen": "all" if config.data.packing else "non_padding",
        # without a GPU, several processes find together only where a CPU is asked for
        "use_cpu": count_asked() > 1 and not torch.accelerator.is_available(),
        # every adapter has a gradient in every pass, but where routes are drawn, which the trainer knows
        "ddp_find_unused_parameters": False,
    }


def _check_effective(arguments: TrainingArguments) -> None:
    if arguments.eval_strategy != "no":
        raise ConfigError(
            f"train.arguments.eval_strategy: got {arguments.eval_strategy.value!r}; valid: 'no', "
            "since a run is evaluated before and after training"
        )
    if arguments.save_only_model:
        raise ConfigError(
            "train.arguments.save_only_model: got True; valid: False, since a run could not go on from there"
        )


def _check_types(arguments: Mapping[str, Any]) -> None:
    """`ConfigError` for text in place of a number, which `TrainingArguments` would take and fail on later."""
    for field in fields(TrainingArguments):
        given = arguments.get(field.name)
        if isinstance(given, str) and isinstance(field.default, int | float):
            raise ConfigError(f"train.arguments.{field.name}: got {given!r}; valid: a number, such as {field.default}")
