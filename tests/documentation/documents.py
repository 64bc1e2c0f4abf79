"""What a block of YAML or JSON is, told by its keys, and read by what reads such a file."""

import json

import yaml

from mixora.comparison.settings import Comparison, read_comparison
from mixora.data.formats import detect_form, problem_of
from mixora.training.run_config import RunConfig, read_run
from tests.documentation.mixora_command import RUN


def check_yaml(text, folder):
    """`ConfigError` for settings that are wrong, `AssertionError` for what is no settings file."""
    tree = yaml.safe_load(text)
    if "methods" in tree:
        read_comparison({**RUN, **tree})
    elif tree.keys() <= RunConfig.model_fields.keys():
        read_run({**RUN, **tree})
    elif "compute_environment" in tree:
        _check_accelerate(text, folder)
    else:
        keys = sorted({*RunConfig.model_fields, *Comparison.model_fields})
        raise AssertionError(f"got {sorted(tree)}; a run or a comparison has {keys}")


def _check_accelerate(text, folder):
    from accelerate.commands.config.config_args import load_config_from_file

    (folder / "accelerate.yaml").write_text(text)
    load_config_from_file(str(folder / "accelerate.yaml"))


def check_json(text, folder):
    """A file of DeepSpeed, an answer of the server, or rows of one form."""
    try:
        rows = [json.loads(text)]
    except ValueError:
        rows = [json.loads(line) for line in text.splitlines()]
    (first, *_) = rows
    if "zero_optimization" in first:
        from accelerate.utils.deepspeed import HfDeepSpeedConfig

        assert HfDeepSpeedConfig(first).is_zero3()
    elif "object" in first:
        _check_answer(first)
    else:
        form = detect_form(rows, "the block")
        assert not (problems := [problem for row in rows if (problem := problem_of(row, form))]), problems


def _check_answer(answer):
    from openai.types import Completion, Model
    from openai.types.chat import ChatCompletion

    kinds = {"chat.completion": ChatCompletion, "text_completion": Completion, "model": Model}
    kinds[answer["object"]].model_validate(answer)


CHECKS = {"yaml": check_yaml, "json": check_json, "jsonl": check_json}
