"""Checkpoints of a trainer that are there whole or not at all, whenever the process or the disk fails."""

from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from mixora.errors import CheckpointError, UnwrittenError
from mixora.files.asides import ASIDE, discard, leave, remove, settle, tell_room, why_unwritten
from mixora.training.manifest import MANIFEST, find_damage, write_manifest


class WholeCheckpoints:
    """Mix in before a `transformers.Trainer` class: `checkpoint-N` is written aside, with a manifest, and renamed.

    Older checkpoints go only when the new one stands. Going on from a damaged one is a `CheckpointError`; a full disk
    is an `UnwrittenError` that names what is left.
    """

    _aside: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        """Where the trainer writes a checkpoint: aside, while one is written."""
        host: Any = super()
        return str(self._aside or host._get_output_dir(trial))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        host: Any = super()
        trainer: Any = self
        run = Path(self._get_output_dir(trial))
        final = run / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        aside = run / ASIDE / final.name
        try:
            if trainer.args.should_save:
                remove(aside)
            trainer.accelerator.wait_for_everyone()
            self._aside = aside.parent
            host._save_checkpoint(model, trial)
            self._aside = None
            self._finish(aside, final)
        except Exception as error:
            if reason := why_unwritten(error):
                remove(aside)
                raise UnwrittenError(
                    f"{final}: could not be written: {reason}; {tell_room(run)}; left: {_name_checkpoints(run)}"
                ) from error
            raise
        finally:
            self._aside = None
            remove(aside)
            leave(aside.parent)
        if trainer.args.should_save:
            self._remove_old(run)
        if trainer.args.push_to_hub:
            host._push_from_checkpoint(str(final))

    def _finish(self, aside: Path, final: Path) -> None:
        """Rename it once all ranks have written; the second turn is for nodes that share no disk with the first."""
        trainer: Any = self
        trainer.accelerator.wait_for_everyone()
        for is_mine in (trainer.args.should_save, trainer.args.local_process_index <= 0):
            if is_mine and aside.is_dir():
                self._name_best(aside, final)
                write_manifest(aside)
                settle(aside, final)
            trainer.accelerator.wait_for_everyone()

    def _name_best(self, aside: Path, final: Path) -> None:
        """The trainer looked for its best checkpoint aside."""
        trainer: Any = self
        state = trainer.state
        best = final.parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
        if state.best_global_step and (best == final or best.is_dir()):
            state.best_model_checkpoint = str(best)
            state.save_to_json(str(aside / "trainer_state.json"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Not from aside, where it would go away under the upload."""
        host: Any = super()
        if self._aside is None:
            host._push_from_checkpoint(checkpoint_folder)

    def _remove_old(self, run: Path) -> None:
        """As transformers does, but so that no half of a checkpoint can stay."""
        trainer: Any = self
        limit = trainer.args.save_total_limit
        if not limit or limit < 0:
            return
        found = [Path(path) for path in sort_checkpoints(str(run), use_mtime=True)]
        best = trainer.state.best_model_checkpoint
        kept = {found[-1], *([Path(best)] if best else [])}
        spare = [path for path in found if path not in kept]
        for path in spare[: max(0, len(found) - max(limit, len(kept)))]:
            discard(path)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        host: Any = super()
        folder = Path(resume_from_checkpoint)
        # those of other trainers have no manifest
        if (folder / MANIFEST).is_file() and (damage := find_damage(folder)):
            raise CheckpointError(f"{folder}: is damaged: {damage}; valid: an older checkpoint")
        host._load_from_checkpoint(resume_from_checkpoint, model)


def _name_checkpoints(run: Path) -> str:
    names = [Path(path).name for path in sort_checkpoints(str(run))]
    return f"{', '.join(names)} in {run}" if names else f"no checkpoint in {run}"
