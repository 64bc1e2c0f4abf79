"""Progress: bars on a terminal, plain lines in a log, nothing where machines read."""

import io
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
from rich.console import Console

from mixora.display.stages import count, silently
from mixora.training import progress as module
from mixora.training.interruption import Interruption
from mixora.training.progress import Progress, StepProgress
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.test_run import settings


class Clock:
    """Each look takes so many seconds."""

    def __init__(self, seconds):
        self.now, self.seconds = 0.0, seconds

    def monotonic(self):
        self.now += self.seconds
        return self.now


def log(**how):
    return Progress(Console(file=io.StringIO(), width=100, **how))


def text_of(progress):
    return progress.console.file.getvalue()


def run(progress, steps, note=""):
    with progress.task("counting") as advance:
        for done in range(1, steps + 1):
            advance(done, steps, note)


def test_a_terminal_gets_a_bar_with_the_remaining_time():
    progress = log(force_terminal=True)
    run(progress, 3, "loss 1.5")
    assert "3/3" in text_of(progress) and "left" in text_of(progress) and "loss 1.5" in text_of(progress)


def test_a_log_gets_plain_lines_now_and_then(monkeypatch):
    monkeypatch.setattr(module, "time", Clock(10))
    progress = log()
    run(progress, 6)
    # every second look is 15 seconds or more after the last line; 10 seconds a step
    assert text_of(progress).splitlines() == [
        "counting: 2 of 6, 0:00:40 left",
        "counting: 4 of 6, 0:00:20 left",
        "counting: 6 of 6, 0:00:00 left",
    ]
    assert "\x1b" not in text_of(progress) and "\r" not in text_of(progress)


def test_a_count_that_begins_anew_begins_its_time_anew(monkeypatch):
    monkeypatch.setattr(module, "time", Clock(20))
    progress = log()
    with progress.task("counting") as advance:
        for done in (5, 6, 1, 2):
            advance(done, 10)
    assert text_of(progress).splitlines() == [
        "counting: 5 of 10",
        "counting: 6 of 10, 0:01:20 left",
        "counting: 1 of 10",
        "counting: 2 of 10, 0:02:40 left",
    ]


@pytest.mark.parametrize("how", [{"quiet": True}, {"quiet": True, "force_terminal": True}])
def test_where_machines_read_there_is_nothing(how, monkeypatch):
    monkeypatch.setattr(module, "time", Clock(100))
    progress = log(**how)
    run(progress, 3)
    assert text_of(progress) == ""


def test_what_is_short_writes_nothing_to_a_log():
    progress = log()
    run(progress, 100)
    assert text_of(progress) == ""


def test_items_are_counted_once_they_are_done_with():
    told = []
    for item in count("abc", lambda done, total: told.append((done, total))):
        assert len(told) == "abc".index(item)
    assert told == [(1, 3), (2, 3), (3, 3)]
    with silently("x") as advance:
        advance(1, 2)


def test_every_long_step_of_a_run_is_told(bases, data, tmp_path, monkeypatch):
    labels, ended = [], []
    task = Progress.task

    def watch(self, label):
        labels.append(label)
        return task(self, label)

    monkeypatch.setattr(Progress, "task", watch)
    monkeypatch.setattr(StepProgress, "on_step_end", lambda self, args, state, control, **_: ended.append(1))
    progress = log()
    tree = settings(bases / "llama", data / "commands", tmp_path / "out")
    tree["adapter"] |= {"allocator": {"kind": "sensitivity", "batches": 2}}
    fit(read_run(tree), progress)
    expected = ["reading", "encoding, rows", "allocating, sensitivity", "evaluating, before", "training"]
    expected += ["evaluating, after", "inspecting, batches", "evaluating, read back", "writing the report"]
    assert labels == expected
    assert "\x1b" not in text_of(progress)


def test_a_run_in_a_thread_leaves_signals_alone():
    """Only the main one may set handlers."""
    before = signal.getsignal(signal.SIGINT)

    def enter():
        with Interruption() as interruption:
            return signal.getsignal(signal.SIGINT), interruption.requested

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == (before, False)
