"""What a person sees while a run goes on: lines, tables, and bars with the remaining time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from transformers import TrainerCallback

Advance = Callable[[int, int], None]
ROUTING = {"routing/evenness": "experts' evenness", "routing/dropped_share": "dropped"}


class Progress:
    """Writes to `console`; a quiet console makes a silent run."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(text, style="dim", highlight=False, markup=False)

    def show(self, renderable: RenderableType) -> None:
        """A table or the like."""
        self.console.print(renderable)

    @contextmanager
    def task(self, label: str) -> Iterator[Advance]:
        """A bar; gives a function of (done, total)."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Bars(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(label, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)


class StepProgress(TrainerCallback):
    """A bar over the optimiser's steps, with the latest loss."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Bars(*columns, TextColumn("{task.description}"), console=self.progress.console, transient=True)
        self._task = self._bars.add_task("", total=state.max_steps)
        self._bars.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step further."""
        self._bars.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest loss, and what the routers do."""
        if logs and "loss" in logs:
            said = [f"loss {float(logs['loss']):.4f}"]
            said += [f"{words} {logs[name]:.0%}" for name, words in ROUTING.items() if name in logs]
            self._bars.update(self._task, description=", ".join(said))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self._bars.stop()
