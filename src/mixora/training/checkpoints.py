"""What an interrupted run left behind, and the settings with which it goes on.

A checkpoint is what transformers' trainer writes: the adapter, optimiser, schedule, random states and its own state.
"""

import shlex
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixora.config import merge_trees, parse
from mixora.diagnostics.record import RECORD
from mixora.errors import CheckpointError, ConfigError, NonFiniteError, StoppedError
from mixora.loading import check_files
from mixora.training.bad_steps import count_left_out
from mixora.training.run_config import RunConfig, read_settings
from mixora.training.run_folder import CHECKPOINTS, RUN_FILE

MAY_CHANGE = (
    "title",
    "evaluate",
    "train.log_every",
    "train.save_every",
    "train.keep_checkpoints",
    "train.skip_bad_steps",
)
"""Settings that a resumed run may change, since training does not depend on them."""


def read_resumed(run: Path, changes: Mapping[str, Any]) -> RunConfig:
    """The settings of the interrupted run in a folder, with changes.

    Raises `CheckpointError` if the run is finished or none, `ConfigError` for changes that would make it another run.
    """
    if not (run / RUN_FILE).is_file():
        raise CheckpointError(f"{run}: is not the folder of a run; valid: what `mixora train --out` wrote")
    if (run / RECORD).is_file():
        raise CheckpointError(f"{run}: this run is finished; valid: one that was stopped, or a new run")
    tree = {**read_settings(run / RUN_FILE), "out": str(run)}
    before, after = (parse(RunConfig, settings) for settings in (tree, merge_trees(tree, changes)))
    old, new = (dict(_leaves(settings.model_dump(mode="json"))) for settings in (before, after))
    for path in {**old, **new}:
        if old.get(path) != new.get(path) and not _may_change(path):
            raise ConfigError(
                f"{path}: got {new.get(path)!r}, but {run} was started with {old.get(path)!r}; "
                f"valid: the same, or a new run (free to change: {', '.join(MAY_CHANGE)})"
            )
    return after


def _may_change(path: str) -> bool:
    return any(path == name or path.startswith(name + ".") for name in MAY_CHANGE)


def _leaves(tree: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{at}{name}.")
        else:
            yield f"{at}{name}", value


def find_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint; `CheckpointError` where there is none."""
    found = sorted((run / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step_of, reverse=True)
    for checkpoint in found:
        if _is_whole(checkpoint):
            return checkpoint
    state = f"{len(found)} damaged checkpoints" if found else "no checkpoint"
    raise CheckpointError(f"{run}: has {state} to go on from; valid: start anew, with --overwrite")


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_state(checkpoint)
        check_files(checkpoint)
    except (OSError, ValueError, TypeError):
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt"))


def read_state(checkpoint: Path) -> TrainerState:
    """How far training had come; the trainer writes it last."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """An interruption becomes `StoppedError`, which says how to go on, where there is a checkpoint.

    A step that is not finite remains an error, which says the same.
    """
    try:
        yield
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}\n{_tell_way_on(run)}") from error
    except KeyboardInterrupt:
        try:
            checkpoint = find_checkpoint(run)
        except CheckpointError:
            raise KeyboardInterrupt from None
        state = read_state(checkpoint)
        raise StoppedError(
            f"after step {state.global_step} of {state.max_steps}, which is saved; to go on:\n"
            f"mixora train --resume {shlex.quote(str(run))}"
        ) from None


def _tell_way_on(run: Path) -> str:
    """After a step whose numbers went wrong: where the run can go on from, and what leaves that step out."""
    try:
        state = read_state(find_checkpoint(run))
    except CheckpointError:
        return "There is no checkpoint to go on from."
    allowed = count_left_out(state.log_history) + 1
    return (
        f"The state after step {state.global_step} is saved; to go on, and leave out what is not finite:\n"
        f"mixora train --resume {shlex.quote(str(run))} --skip-bad-steps {allowed}"
    )


def remove_checkpoints(run: Path) -> None:
    """Once the results stand."""
    shutil.rmtree(run / CHECKPOINTS, ignore_errors=True)
