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
    """The trainer's arguments as `config` says.

    Raises `ConfigError` for those that transformers refuses, and for those that a setting of the run stands for: what
    reads the settings, such as a resumed run, would not find them.
    """
    given, follow = config.train.arguments, _follow(config)
    for name, (setting, _) in follow.items():
        if name in given:
            raise ConfigError(f"train.arguments.{name}: got {given[name]!r}; valid: the setting {setting}")
    _check_types(given)
    try:
        arguments = TrainingArguments(**{name: value for name, (_, value) in follow.items()}, **_usual(config) | given)
    except Exception as error:
        # each argument has a check of its own
        raise ConfigError(f"train.arguments: {error}") from None
    _check_effective(arguments)
    return arguments


def _follow(config: RunConfig) -> dict[str, tuple[str, Any]]:
    """What follows from settings of a run: by transformers' name, the setting's name and the value."""
    train = config.train
    return {
        "output_dir": ("out", str(Path(config.out) / CHECKPOINTS)),
        "max_steps": ("train.steps", train.steps or -1),
        # what is drawn from tasks is as long as the run
        "num_train_epochs": ("train.epochs", train.epochs if config.data.tasks is None else 1),
        "per_device_train_batch_size": ("train.batch_size", train.batch_size),
        "gradient_accumulation_steps": ("train.gradient_accumulation", train.gradient_accumulation),
        "learning_rate": ("train.learning_rate", train.learning_rate),
        "warmup_steps": ("train.warmup_steps", train.warmup_steps),
        "seed": ("train.seed", train.seed),
        "logging_steps": ("train.log_every", train.log_every),
        "save_strategy": ("train.save_every", "steps" if train.save_every else "no"),
        "save_steps": ("train.save_every", train.save_every or 1),
        "save_total_limit": ("train.keep_checkpoints", None if train.keep_checkpoints else 2),
    }


def _usual(config: RunConfig) -> dict[str, Any]:
    """What is so unless `train.arguments` says otherwise."""
    return {
        # transformers has more of them than `train.schedule`
        "lr_scheduler_type": config.train.schedule,
        # what is drawn from tasks is in the order of the run
        "train_sampling_strategy": "random" if config.data.tasks is None else "sequential",
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
