"""The folder of a run: claimed once everything is read, so that a mistake costs no earlier results."""

from pathlib import Path

from mixora.files.asides import remove, writing
from mixora.files.documents import write_yaml
from mixora.files.folders import check_folder, claim_folder
from mixora.training.run_config import RunConfig

RUN_FILE = "run.yaml"
CHECKPOINTS = "checkpoints"


def paths_read(config: RunConfig) -> list[str]:
    """What a run reads, and so must not replace."""
    return [*(task.source for task in config.data.by_task().values()), config.model.base]


def open_folder(config: RunConfig, overwrite: bool) -> Path:
    """Make the folder of a run, empty but for its settings; an earlier run's results go if they may."""
    reads = paths_read(config)
    # first, or what a kill leaves of an earlier run would look like one to go on with
    remove(check_folder(config.out, overwrite, reads) / RUN_FILE)
    out = claim_folder(config.out, overwrite, reads)
    write_settings(config)
    return out


def write_settings(config: RunConfig) -> None:
    """The run's settings as a run file."""
    text = write_yaml(config.model_dump(mode="json"))
    with writing(Path(config.out) / RUN_FILE) as path:
        path.write_text(text, encoding="utf-8")
