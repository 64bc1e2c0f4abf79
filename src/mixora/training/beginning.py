"""Where a run begins: at step 0, or where an interrupted one can go on."""

from dataclasses import dataclass
from pathlib import Path

from mixora.training.checkpoints import find_checkpoint
from mixora.training.material import Material, TrainingSet
from mixora.training.processes import check_resumable
from mixora.training.progress import Progress
from mixora.training.start import START, Start, check_start, describe_start


@dataclass(frozen=True)
class Beginning:
    """`start`: what the run was started with. `checkpoint`: None at step 0. `notes`: what its report has to tell."""

    start: Start
    checkpoint: Path | None = None
    notes: tuple[str, ...] = ()


def begin(run: Path, material: Material, rows: TrainingSet, resume: bool, progress: Progress) -> Beginning:
    """With `resume`, from the newest whole checkpoint, naming what is damaged; step 0 where there is none.

    Raises `CheckpointError` where rows or base are not those that the run was started with.
    """
    start = describe_start(material, rows)
    changed: list[str] = []
    if not resume:
        return Beginning(start)
    checkpoint, damaged = find_checkpoint(run)
    if checkpoint is not None:
        check_resumable(checkpoint)
    # without both, it was stopped before it began to train
    if checkpoint or damaged or (run / START).is_file():
        start, changed = check_start(run, start)
    for note in (*damaged, *changed):
        progress.say(f"note: {note}")
    progress.say(
        f"going on from {checkpoint}" if checkpoint else f"{run} has no whole checkpoint: going on from step 0"
    )
    return Beginning(start, checkpoint, (*damaged, *changed))
