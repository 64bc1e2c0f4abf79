"""Steps whose numbers go wrong: a loss or gradients that are not finite change no weight.

The norm of all gradients, which a trainer computes in every step and which all data-parallel ranks share, is the one
number that is looked at: a loss that is not finite makes all gradients NaN. Only if it is not finite, the step is run
again under watch (`bad_place`), with the same batch and the same random states.
"""

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mixora.diagnostics.record import BadStep
from mixora.errors import NonFiniteError
from mixora.training.bad_place import Place, Search, count_bad, is_finite, look_at_sums
from mixora.training.random_states import RandomState

logger = logging.getLogger("mixora")
LEFT_OUT, BAD_STEP = "skipped_steps", "bad_step"
"""In a trainer's log: how many steps were left out so far, and what is known of the last of them."""
LEAST_SCALE = 1.0
"""While the loss scale of fp16 is above, gradients that overflow are the scaler's business."""


@dataclass(frozen=True)
class _MicroBatch:
    """What a call of `training_step` was given, and the random states it began with."""

    random_state: RandomState
    inputs: Mapping[str, Any]
    further: tuple[Any, ...]
    options: dict[str, Any]


@dataclass(frozen=True)
class _Before:
    """What a step that is left out must leave as it was; `logged`: the step of the last log line."""

    loss_since_log: Tensor | None = None
    tokens_seen: int = 0
    logged: int = 0


def count_left_out(log: Iterable[Mapping[str, Any]]) -> int:
    """How many steps were left out, by a trainer's log."""
    return sum(BAD_STEP in line for line in log)


class FiniteSteps:
    """Mix in before a `transformers.Trainer`: stops before the update of a step whose loss or gradients are not finite.

    `skip_bad_steps`: so many such steps of a run are left out instead. A step that is left out counts as a step: its
    rows are used up and the schedule goes on, but no weight and no state of the optimiser changes.
    """

    def __init__(self, *args: Any, skip_bad_steps: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.skip_bad_steps = skip_bad_steps
        self.saves_before_bad_step = False
        self._micro_batches: list[_MicroBatch] = []
        self._losses: list[Tensor] = []
        self._search: Search | None = None
        self._before = _Before()
        self._epoch = _EpochBegin()
        self.add_callback(self._epoch)  # type: ignore[attr-defined]

    @property
    def bad_steps(self) -> list[BadStep]:
        """The steps of this run that were left out, those before it was resumed included."""
        return [BadStep(**line[BAD_STEP]) for line in self.state.log_history if BAD_STEP in line]  # type: ignore[attr-defined]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer does, at the beginning of a step."""
        trainer: Any = self
        self._micro_batches.clear()
        self._losses.clear()
        loss = getattr(trainer, "_tr_loss", None)
        kept = loss if loss is None else loss.clone()
        self._before = _Before(kept, trainer.state.num_input_tokens_seen, trainer._globalstep_last_logged)
        host: Any = super()
        return host.get_batch_samples(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As the trainer does; keeps what it takes to do so again."""
        if self._search is None:
            self._micro_batches.append(_MicroBatch(RandomState.now(), inputs, args, kwargs))
        host: Any = super()
        return host.training_step(model, inputs, *args, **kwargs)

    def _guard(self, loss: Tensor, task: Tensor, terms: Mapping[str, Tensor], labels: Any) -> Tensor:
        """The loss, from which only NaN flows back where it is not finite: the norm of the gradients tells of both."""
        if self._search is not None:
            self._search.look_at_loss(task, terms, labels)
        self._losses.append(loss.detach())
        return loss * (loss.detach() * 0 + 1)

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        host: Any = super()
        norm = host._get_grad_norm(model, *args, **kwargs)
        is_bad = not _is_finite(norm)
        if is_bad and not self._is_left_to_scaler():
            self._meet_bad_step(model)
        self._epoch.random_state = None
        return norm

    def _is_left_to_scaler(self) -> bool:
        """Whether gradients of fp16 overflow under a scale that will be halved, the loss being finite everywhere."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        if accelerator.scaler is None or accelerator.scaler.get_scale() <= LEAST_SCALE:
            return False
        bad = torch.stack([~torch.isfinite(loss).all() for loss in self._losses]).any()
        return not bool(accelerator.reduce(bad.float(), "sum"))

    def _meet_bad_step(self, model: nn.Module) -> None:
        """Leave the step out, or raise `NonFiniteError`."""
        trainer: Any = self
        place, process, rows = self._find_place(model)
        trainer.state.num_input_tokens_seen = self._before.tokens_seen
        bad = BadStep(
            step=trainer.state.global_step + 1,
            place="not found: all was finite when the step was run again" if place is None else str(place),
            micro_batch=1 if place is None else place.micro_batch,
            rows=rows,
        )
        text = self._describe(bad, place, process)
        if self._before.loss_since_log is not None:
            trainer._tr_loss.copy_(self._before.loss_since_log)
        self._forget_step()
        if len(self.bad_steps) >= self.skip_bad_steps:
            if self.saves_before_bad_step:
                self._save_state_before(model)
            raise NonFiniteError(text)
        count = len(self.bad_steps) + 1
        trainer.log({LEFT_OUT: count})
        trainer.state.log_history[-1][BAD_STEP] = asdict(bad)
        logger.warning("left out (%d of at most %d): %s", count, self.skip_bad_steps, text)

    def _forget_step(self) -> None:
        """Drop readings for the log that hold those of the step."""

    def _find_place(self, model: nn.Module) -> tuple[Place | None, int, list[int]]:
        """The first bad place, the process it is in, and the rows of the training data; drops all gradients.

        All ranks run all that has collectives in it, whatever they find.
        """
        trainer: Any = self
        after = RandomState.now()
        _drop_gradients(model)
        place, rows = None, list[int]()
        for number, seen in enumerate(tuple(self._micro_batches), 1):
            seen.random_state.restore()
            self._search = search = Search(model, seen.inputs)
            with search.watching(), torch.compiler.set_stance("force_eager"):
                self.training_step(model, seen.inputs, *seen.further, **seen.options)
            if place is None and search.place is not None:
                place = replace(search.place, micro_batch=number)
                rows = find_rows(trainer.train_dataset, seen.inputs, place.rows)
        self._search = None
        after.restore()
        found = [(place, trainer.accelerator.process_index, rows)]
        if trainer.accelerator.num_processes > 1:
            found = gather_object(found)
        bad = [(at.micro_batch, at.is_shared, process) for at, process, _ in found if at is not None]
        result = found[min(bad)[2]] if bad else (look_at_sums(model), 0, rows)
        _drop_gradients(model)
        return result

    def _describe(self, bad: BadStep, place: Place | None, process: int) -> str:
        trainer: Any = self
        where = [f"step {bad.step}: {bad.place}"]
        if len(self._micro_batches) > 1:
            where.append(f"micro-batch {bad.micro_batch} of {len(self._micro_batches)}")
        if trainer.accelerator.num_processes > 1:
            where.append(f"process {process}")
        if bad.rows:
            where.append(f"row{'s' * (len(bad.rows) > 1)} {', '.join(map(str, bad.rows))} of the training data")
        advice = "train.deterministic, to make it recur" if place is None else place.advice
        return f"{', '.join(where)}; no weight was changed. Try: {advice}; or leave such steps out (skip_bad_steps)"

    def _save_state_before(self, model: nn.Module) -> None:
        """A checkpoint from which the step at hand comes next; what cannot be written must not hide the error."""
        trainer: Any = self
        folder = Path(trainer.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}"
        if folder.exists():
            return
        (self._epoch.random_state or self._micro_batches[0].random_state).restore()
        with suppress(OSError, NonFiniteError):
            trainer._save_checkpoint(model, trial=None)

    def _save_checkpoint(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """As the trainer does, unless the last update left weights that are not finite: those are not kept."""
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not is_finite(parameter):
                step = self.state.global_step  # type: ignore[attr-defined]
                raise NonFiniteError(
                    f"step {step}: its update made {name} {count_bad(parameter)}, which is not saved. Try: "
                    "a smaller learning_rate, or warmup_steps, and an earlier checkpoint"
                )
        host: Any = super()
        host._save_checkpoint(model, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer does; the loss is the mean over steps that were not left out, NaN if there was none."""
        trainer: Any = self
        for name, since in (("loss", self._before.logged), ("train_loss", getattr(trainer, "_initial_global_step", 0))):
            left_out = sum(bad.step > since for bad in self.bad_steps) if name in logs else 0
            if left_out:
                steps = trainer.state.global_step - since
                logs = {**logs, name: logs[name] * steps / (steps - left_out) if steps > left_out else math.nan}
        host: Any = super()
        host.log(logs, *args, **kwargs)


class _EpochBegin(TrainerCallback):
    """Keeps the random states that an epoch begins with, before its loader draws from them, until its first step."""

    def __init__(self) -> None:
        self.random_state: RandomState | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.random_state = RandomState.now()


def _is_finite(norm: Any) -> bool:
    if isinstance(norm, Tensor):
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return bool(torch.isfinite(whole))
    return norm is None or math.isfinite(norm)


def _drop_gradients(model: nn.Module) -> None:
    """Parameters without a gradient are left alone by every optimiser."""
    for parameter in model.parameters():
        parameter.grad = None


def find_rows(dataset: Any, inputs: Mapping[str, Any], places: tuple[int, ...]) -> list[int]:
    """Which rows of `dataset` stand at the `places` of a batch (none given: at all of them), by their token ids.

    Empty where that cannot be told: rows without `input_ids`, batches without a mask. Reads the data set from its
    beginning.
    """
    ids_BS, mask_BS = inputs.get("input_ids"), inputs.get("attention_mask")
    if not isinstance(ids_BS, Tensor) or not isinstance(mask_BS, Tensor) or not hasattr(dataset, "__len__"):
        return []
    wanted = {tuple(ids_BS[place][mask_BS[place].bool()].tolist()) for place in places or range(len(ids_BS))}
    found = []
    for number in range(len(dataset)):
        row = dataset[number]
        ids = tuple(row["input_ids"]) if isinstance(row, Mapping) and "input_ids" in row else None
        if ids in wanted:
            found.append(number)
            wanted.discard(ids)
        if not wanted:
            break
    return found
