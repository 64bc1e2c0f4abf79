"""Results of trials: a line of JSON each, in `results/TABLE.jsonl`, added as they come and kept in the repository."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from benchmarks.quality.table import Trial, final_trials, match_table, read_table, tuning_trials
from mixora.comparison.results import is_better_low
from mixora.errors import DataError
from mixora.files.documents import UnreadableError, parse_json

RESULTS = Path(__file__).parent / "results"
Found = Mapping[str, Any]


class Results:
    """What is known of a table's trials. Results of trials whose settings changed since are passed over."""

    def __init__(self, name: str, folder: Path = RESULTS) -> None:
        self.name = name
        self.path = folder / f"{name.replace('/', '--')}.jsonl"
        self._by_digest = _read(self.path) if self.path.exists() else {}

    def of(self, trial: Trial) -> Found | None:
        """What `trial` gave; None while it was not made."""
        return self._by_digest.get(trial.digest)

    def lines(self) -> list[Found]:
        """All results that count."""
        known = ((*tuning_trials(self.name, *cell), *self._final_trials(*cell)) for cell in cells(self.name))
        return [line for trials in known for trial in trials if (line := self.of(trial)) is not None]

    def add(self, trial: Trial, found: Found) -> None:
        """Keep what a trial gave."""
        names = dict(zip(("table", "data", "method", "stage", "rate", "seed"), trial.key, strict=True))
        line = {**names, "digest": trial.digest, **found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            _end_behind_last_line(file)
            file.write(json.dumps(line).encode() + b"\n")
        self._by_digest[line["digest"]] = line

    def tuning(self, data: str, method: str) -> dict[float, float | None]:
        """The metric on validation rows by learning rate; None for one whose numbers went wrong."""
        found = {trial.rate: self.of(trial) for trial in tuning_trials(self.name, data, method)}
        return {rate: self._score(data, line) for rate, line in found.items() if line is not None}

    def best_rate(self, data: str, method: str) -> float | None:
        """The learning rate that validation rows chose; None before all were tried, or where none worked."""
        scores = self.tuning(data, method)
        known = {rate: score for rate, score in scores.items() if score is not None}
        if len(scores) < len(read_table(self.name).rates_of(data)) or not known:
            return None
        sign = 1 if is_better_low(read_table(self.name).metrics[data]) else -1
        return min(known, key=lambda rate: sign * known[rate])

    def finals(self, data: str, method: str) -> dict[int, Found]:
        """The finished final trials by seed, those that failed left out."""
        found = {trial.seed: self.of(trial) for trial in self._final_trials(data, method)}
        return {seed: line for seed, line in found.items() if line is not None and "failed" not in line}

    def _final_trials(self, data: str, method: str) -> list[Trial]:
        rate = self.best_rate(data, method)
        return [] if rate is None else final_trials(self.name, data, method, rate)

    def _score(self, data: str, line: Found) -> float | None:
        if "failed" in line:
            return None
        (of_way,) = line["metrics"].values()
        return float(of_way[read_table(self.name).metrics[data]])


def _read(path: Path) -> dict[str, Found]:
    """Lines by digest; `DataError` for one that is none. What a crash left of the last one is passed over."""
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    if rest:
        place = f"{path}, line {len(lines) + 1}"
        print(f"{place}: was not written to its end and is passed over: its trial is made again", file=sys.stderr)
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            value = parse_json(line, finite=False)
            found[value["digest"]] = value
        except (UnreadableError, TypeError, KeyError) as error:
            reason = error if isinstance(error, UnreadableError) else "has no digest"
            raise DataError(
                f"{path}, line {number}: {reason}; valid: a result, or no line: its trial is made again"
            ) from None
    return found


def _end_behind_last_line(file: BinaryIO) -> None:
    """Cut off what a crash left of a line."""
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def waiting(results: Results, data: str, method: str) -> Iterator[Trial]:
    """The trials of a method that can be made now: those of tuning, then the final ones."""
    trials = tuning_trials(results.name, data, method)
    rate = results.best_rate(data, method)
    if rate is not None:
        trials = final_trials(results.name, data, method, rate)
    return (trial for trial in trials if results.of(trial) is None)


def is_complete(results: Results, data: str) -> bool:
    """Whether every trial on a data set was made."""
    methods = [method.name for method in read_table(results.name).methods]
    return all(next(waiting(results, data, method), None) is None for method in methods)


def cells(name: str) -> list[tuple[str, str]]:
    """Data sets and methods of a table, one data set after the other."""
    return [(data, method) for data in read_table(name).data for method in match_table(name, data)]
