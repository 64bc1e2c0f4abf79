"""What an interrupted run left behind, and the settings with which it goes on.

A checkpoint is what transformers' trainer writes: the adapter, optimiser, schedule, random states and its own state;
beside it what our trainers have read since the last log line, and a manifest.
"""

import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixora.config import merge_trees, parse
from mixora.diagnostics.record import RECORD
from mixora.errors import CheckpointError, ConfigError, NonFiniteError, StoppedError, UnwrittenError
from mixora.files.asides import ASIDE, remove
from mixora.files.folders import MARK
from mixora.files.locks import FolderLock
from mixora.training.bad_steps import count_left_out
from mixora.training.manifest import find_damage
from mixora.training.run_config import RunConfig, leaves_of, read_settings
from mixora.training.run_folder import CHECKPOINTS, RUN_FILE
from mixora.training.start import START

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
    old, new = (dict(leaves_of(settings.model_dump(mode="json"))) for settings in (before, after))
    for path in {**old, **new}:
        if old.get(path) != new.get(path) and not _may_change(path):
            raise ConfigError(
                f"{path}: got {new.get(path)!r}, but {run} was started with {old.get(path)!r}; "
                f"valid: the same, or a new run (free to change: {', '.join(MAY_CHANGE)})"
            )
    return after


def _may_change(path: str) -> bool:
    return any(path == name or path.startswith(name + ".") for name in MAY_CHANGE)


def find_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, if there is one, and of each newer one what is wrong with it, in words."""
    damaged: list[str] = []
    for checkpoint in sorted((run / CHECKPOINTS).glob(f"{PREFIX_CHECKPOINT_DIR}-*"), key=_step_of, reverse=True):
        damage = find_damage(checkpoint)
        if damage is None:
            return checkpoint, damaged
        damaged.append(f"{checkpoint} was passed over, since it is not whole: {damage}.")
    return None, damaged


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1


def read_state(checkpoint: Path) -> TrainerState:
    """How far training had come."""
    return TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))


class ChangedIntervals(TrainerCallback):
    """Log lines and checkpoints come as often as the settings say now; the trainer would follow the checkpoint's."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Right after the checkpoint's state has replaced the trainer's own."""
        state.compute_steps(args, state.max_steps)


@contextmanager
def resumable(run: Path) -> Iterator[None]:
    """An interruption becomes `StoppedError`, which says how to go on, where there is a checkpoint.

    So does an `UnwrittenError`, once there is room again. A step that is not finite remains an error, which says the
    same.
    """
    command = f"mixora train --resume {shlex.quote(str(run))}"
    try:
        yield
    except UnwrittenError as error:
        raise UnwrittenError(f"{error}; to go on, once there is room:\n{command}") from error
    except NonFiniteError as error:
        raise NonFiniteError(f"{error}\n{_tell_way_on(run, command)}") from error
    except KeyboardInterrupt:
        checkpoint, _ = find_checkpoint(run)
        if checkpoint is None:
            raise
        state = read_state(checkpoint)
        raise StoppedError(
            f"after step {state.global_step} of {state.max_steps}, which is saved; to go on:\n{command}"
        ) from None


def _tell_way_on(run: Path, command: str) -> str:
    """After a step whose numbers went wrong: where the run can go on from, and what leaves that step out."""
    checkpoint, _ = find_checkpoint(run)
    if checkpoint is None:
        return "There is no checkpoint to go on from."
    state = read_state(checkpoint)
    allowed = count_left_out(state.log_history) + 1
    return (
        f"The state after step {state.global_step} is saved; to go on, and leave out what is not finite:\n"
        f"{command} --skip-bad-steps {allowed}"
    )


def clear_leftovers(run: Path) -> None:
    """Remove what a killed process had not finished writing, or of a finished run not finished removing.

    Raises `ConfigError` where a process is at work there.
    """
    if not (run / MARK).is_file():
        return
    with FolderLock(run) as lock:
        lock.take()
        for folder in (run, run / CHECKPOINTS):
            remove(folder / ASIDE)
        if (run / RECORD).is_file() and (run / START).is_file():
            finish(run, read_settings(run / RUN_FILE).get("train", {}).get("keep_checkpoints", False))


def finish(run: Path, keep_checkpoints: bool) -> None:
    """Remove what nobody needs once the results stand."""
    if not keep_checkpoints:
        remove(run / CHECKPOINTS)
    remove(run / START)
