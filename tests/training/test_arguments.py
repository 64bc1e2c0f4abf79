"""What `train.arguments` may say: whatever no setting of the run stands for."""

import pytest

from mixora.errors import ConfigError
from mixora.training.arguments import make_arguments
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.test_run import quiet, settings


def arguments_of(tmp_path, **given):
    return make_arguments(read_run(settings("base", "rows.jsonl", tmp_path / "out", train__arguments=given)))


@pytest.mark.parametrize(
    ("name", "value", "setting"),
    [
        ("output_dir", "elsewhere", "out"),
        ("max_steps", 6, "train.steps"),
        ("num_train_epochs", 2, "train.epochs"),
        ("per_device_train_batch_size", 2, "train.batch_size"),
        ("gradient_accumulation_steps", 2, "train.gradient_accumulation"),
        ("learning_rate", 0.1, "train.learning_rate"),
        ("warmup_steps", 2, "train.warmup_steps"),
        ("seed", 2, "train.seed"),
        ("logging_steps", 2, "train.log_every"),
        ("save_strategy", "epoch", "train.save_every"),
        ("save_steps", 2, "train.save_every"),
        ("save_total_limit", 1, "train.keep_checkpoints"),
    ],
)
def test_what_a_setting_stands_for_is_refused(name, value, setting, tmp_path):
    with pytest.raises(ConfigError, match=rf"^train\.arguments\.{name}: got {value!r}; valid: the setting {setting}$"):
        arguments_of(tmp_path, **{name: value})


def test_a_mistake_is_found_before_anything_is_read(tmp_path):
    config = read_run(settings("/nowhere", "/nowhere", tmp_path / "out", train__arguments={"no_such": 1}))
    with pytest.raises(ConfigError, match="no_such"):
        fit(config, quiet())


def test_all_else_may_be_said(tmp_path):
    usual = arguments_of(tmp_path)
    given = {
        "lr_scheduler_type": "polynomial",
        "train_sampling_strategy": "group_by_length",
        "include_num_input_tokens_seen": "no",
        "ddp_find_unused_parameters": True,
        "use_cpu": True,
        "weight_decay": 0.1,
    }
    found = arguments_of(tmp_path, **given)
    assert {name: getattr(found, name) for name in given} == given
    assert not any(getattr(usual, name) == value for name, value in given.items())
    assert (found.max_steps, found.learning_rate) == (usual.max_steps, usual.learning_rate) == (4, 0.01)
