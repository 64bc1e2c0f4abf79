"""The folder of a run: claimed once everything is read, so that a mistake costs no earlier results."""

import shutil
from pathlib import Path

import yaml

from mixora.errors import ConfigError
from mixora.folders import claim_folder
from mixora.training.run_config import RunConfig

RUN_FILE = "run.yaml"
FREE = "another folder, or --overwrite to replace what is there"


def check_folder(out: Path, overwrite: bool) -> None:
    """`ConfigError` if the folder holds something and may not be replaced; changes nothing."""
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise ConfigError(f"out: {out} is not empty; valid: {FREE}")
    if not (out / RUN_FILE).is_file():
        raise ConfigError(
            f"out: {out} was not written by mixora, so --overwrite leaves it alone; valid: another folder"
        )


def open_folder(config: RunConfig, overwrite: bool) -> Path:
    """Make the folder of a run, empty but for its settings; an earlier run's results go if they may."""
    out = Path(config.out)
    check_folder(out, overwrite)
    if overwrite and out.is_dir():
        shutil.rmtree(out)
    claim_folder(out)
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    (out / RUN_FILE).write_text(text, encoding="utf-8")
    return out
