"""The queue: makes the trials that are missing, some at a time, and can be stopped and started again anywhere.

A process lives through many trials, since importing costs as much as a short one; each trial seeds all generators.
"""

import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path

from benchmarks.quality.results import RESULTS, Results, cells, waiting
from benchmarks.quality.table import Trial
from benchmarks.quality.trial import run_trial

PROCESS_TRIALS = 40  # then a new process, so that nothing grows


def work(
    names: Sequence[str], workers: int, minutes: float | None = None, tuning: bool = False, folder: Path = RESULTS
) -> None:
    """Make missing trials of the tables, in order, `workers` at a time on a thread each; begin none after `minutes`.

    `tuning`: only those that look for learning rates, so that test rows stay unseen.
    """
    results = {name: Results(name, folder) for name in names}
    until = None if minutes is None else time.monotonic() + 60 * minutes
    running: dict[Future[dict[str, object]], Trial] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, max_tasks_per_child=PROCESS_TRIALS) as pool:
        while True:
            is_over = until is not None and time.monotonic() >= until
            while len(running) < workers and not is_over and (trial := _next(results, list(running.values()), tuning)):
                running[pool.submit(run_trial, trial)] = trial
            if not running:
                return
            ended, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                trial = running.pop(future)
                found = future.result()
                results[trial.table].add(trial, found)
                _tell(trial, found)


def _next(results: dict[str, Results], running: Sequence[Trial], tuning: bool) -> Trial | None:
    """The first trial that can begin; of one method, the final ones wait for all of tuning."""
    busy = {trial.key for trial in running}
    for name, of_table in results.items():
        for data, method in cells(name):
            for trial in waiting(of_table, data, method):
                if trial.key not in busy and not (tuning and trial.stage == "final"):
                    return trial
    return None


def _tell(trial: Trial, found: dict[str, object]) -> None:
    said = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in trial.key)
    print(f"{time.strftime('%H:%M:%S')} {said}: {found.get('failed') or found['metrics']}", flush=True)
