"""What a person sees while a run goes on: lines, tables, and bars with the remaining time; in a log, lines only."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback
from transformers.utils import logging

from mixora.display.console import Console
from mixora.training.processes import is_started_first

ROUTING = {"routing/evenness": "experts' evenness", "routing/dropped_share": "dropped"}
SECONDS_BETWEEN_LINES = 15.0


class Advance(Protocol):
    """Told what is done and of how much, and perhaps a word on it."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


class Progress:
    """Writes to `console`, in place of what transformers would; a quiet console makes a silent run.

    Of several processes, the first one writes.
    """

    def __init__(self, console: Console) -> None:
        self.console = console if is_started_first() else Console(quiet=True)
        logging.set_verbosity_error()
        logging.disable_progress_bar()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, style="dim", highlight=False, soft_wrap=True)

    def show(self, renderable: RenderableType) -> None:
        """A table or the like."""
        self.console.print(renderable)

    @contextmanager
    def task(self, label: str) -> Iterator[Advance]:
        """Gives a function of (done, total) that moves a bar, or where there is no terminal writes a line at times."""
        if not self.console.is_terminal or self.console.is_dumb_terminal:
            yield _Lines(self, label)
            return
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        remaining = (TextColumn("left"), TimeRemainingColumn())
        with Bars(
            *columns, *remaining, TextColumn("{task.fields[note]}", markup=False), console=self.console, transient=True
        ) as bars:
            task = bars.add_task(label, total=None, note="")

            def advance(done: int, total: int, note: str = "") -> None:
                bars.update(task, completed=done, total=total, note=note)

            yield advance


class _Lines:
    """Plain lines, some time apart; none for what is over sooner."""

    def __init__(self, progress: Progress, label: str) -> None:
        self._progress, self._label = progress, label
        self._told = time.monotonic()
        self._first: tuple[int, float] | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if self._first is None or done < self._first[0]:
            self._first = done, now
        if now - self._told < SECONDS_BETWEEN_LINES:
            return
        self._told = now
        since, began = self._first
        left = ""
        if done > since:
            seconds = round((now - began) / (done - since) * (total - done))
            left = f", {timedelta(seconds=seconds)} left"
        self._progress.say(f"{self._label}: {done} of {total}{left}{note and ', ' + note}")


class StepProgress(TrainerCallback):
    """Tells the optimiser's steps, with the latest loss."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance
        self._note = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further; a resumed run begins later than at 0."""
        self._advance(state.global_step, state.max_steps, self._note)

    on_train_begin = on_step_end

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest loss, and what the routers do."""
        if logs and "loss" in logs:
            said = [f"loss {float(logs['loss']):.4f}"]
            said += [f"{words} {logs[name]:.0%}" for name, words in ROUTING.items() if name in logs]
            self._note = ", ".join(said)
            self._advance(state.global_step, state.max_steps, self._note)
