"""Mutation testing: how many small changes of the code do the tests find?

Each mutant is a file with one change (benchmarks/reliability/mutation.py). The tests of its group that reach the
changed function run against it, in a fork of a warm process, until one fails (benchmarks/reliability/trial.py). What
was killed stays so in the work file, build/mutants.jsonl; a further run tries only the others again, unless --fresh.
"""

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from benchmarks.recording import RESULTS, describe_run, write_results
from benchmarks.reliability.mutation import Mutant, select
from benchmarks.reliability.trial import IN_PLACE_IMPOSSIBLE, attempt, find_reach, try_anew, try_in_place

SOURCE = Path("src")
PACKAGE = SOURCE / "mixora"
A_DAY = 86400.0
REASONS = Path(__file__).parent / "survivors.json"


@dataclass(frozen=True)
class Group:
    """Files that are changed, and the tests that are to notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]

    def paths(self) -> list[Path]:
        return sorted(path for pattern in self.files for path in PACKAGE.glob(pattern))


KERNELS = ("__init__", "choice", "grouped", "loop", "sorted", "sorting", "stacked")
KERNEL_TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("values", "sorting", "choice"))
GROUPS = {
    "losses": Group(("losses/*.py",), ("tests/losses", "tests/contracts/test_losses.py")),
    "routers": Group(("routers/*.py",), ("tests/routers", "tests/contracts/test_routers.py", "tests/references")),
    "routing": Group(
        ("routing/*.py",), ("tests/routing/test_routing.py", "tests/losses", "tests/contracts/test_routers.py")
    ),
    # kernel `triton` runs only interpreted here, at seconds for a test: neither is it changed nor do its tests run
    "kernels": Group(tuple(f"kernels/{name}.py" for name in KERNELS), (*KERNEL_TESTS, "-k", "not triton")),
    "joint": Group(("kernels/joint.py",), ("tests/kernels/test_joint.py",)),
    "plan": Group(("planning/plan.py",), ("tests/planning/test_plan.py", "tests/planning/test_plan_rows.py")),
    # seven seconds each: plain PEFT reads what was written, in a process of its own
    "merging": Group(("merging/*.py",), ("tests/merging", "-k", "not plain_peft_computes")),
}


class Work:
    """The work file: what became of each mutant, one line each."""

    def __init__(self, path: Path, is_fresh: bool) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_fresh:
            path.unlink(missing_ok=True)

    def read(self) -> dict[str, dict[str, Any]]:
        """The last line of each mutant, by its key."""
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {record["key"]: record for record in map(json.loads, lines)}

    def tell(self, mutant: Mutant, outcome: str, seconds: float) -> None:
        record = {
            "key": mutant.key,
            "file": str(mutant.path.relative_to(SOURCE)),
            "line": mutant.line,
            "operator": mutant.operator,
            "diff": mutant.diff,
            "outcome": outcome,
            "seconds": round(seconds, 2),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def is_killed(outcome: str) -> bool:
    return outcome.startswith("killed") or outcome in ("timeout", "crash")


def run_group(group: Group, mutants: Sequence[Mutant], work: Work, budget: float) -> None:
    """Try what is not killed yet: in place where tests reach the change, else with the package imported anew."""
    before = work.read()
    left = [mutant for mutant in mutants if not is_killed(before.get(mutant.key, {}).get("outcome", ""))]
    if not left:
        return
    reach = find_reach(group.tests, group.paths())
    kills = Counter(record["outcome"].removeprefix("killed by ") for record in before.values())

    def choose(mutant: Mutant) -> list[str]:
        return reach.tests_for(mutant, kills, budget)

    def limit(names: Sequence[str]) -> float:
        return 15 + 5 * sum(reach.seconds[name] for name in names)

    def tell(mutant: Mutant, outcome: str, seconds: float) -> None:
        kills[outcome.removeprefix("killed by ")] += 1
        work.tell(mutant, outcome, seconds)

    in_place = [mutant for mutant in left if reach.reaches(mutant)]
    if in_place and attempt(lambda: try_in_place(group.tests, in_place, choose, limit, tell), A_DAY, False) != "done":
        raise SystemExit("the trials in place broke off")
    found = work.read()
    kills.update(record["outcome"].removeprefix("killed by ") for record in found.values())
    for mutant in left:
        if mutant in in_place and found[mutant.key]["outcome"] != IN_PLACE_IMPOSSIBLE:
            continue
        begun, names = time.perf_counter(), choose(mutant)
        outcome = try_anew(mutant, module_of(mutant.path), names, limit(names))
        tell(mutant, outcome, time.perf_counter() - begun)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


def explain(record: dict[str, Any]) -> str | None:
    """Why a survivor does no harm: the first entry of `survivors.json` whose file and expression fit."""
    change = " ".join(line for line in record["diff"])
    for entry in json.loads(REASONS.read_text()):
        if record["file"].startswith(entry["file"]) and re.search(entry["change"], change):
            return str(entry["why"])
    return None


def summarise(records: Iterable[dict[str, Any]], totals: dict[str, int]) -> dict[str, Any]:
    """Figures for each file and package, and the survivors with what is known of them."""
    records = list(records)
    names = [*totals, *(str(Path(file).parent) for file in totals)]
    rows = {name: Counter(mutants=totals.get(name, 0), tried=0, killed=0, explained=0) for name in names}
    survivors = []
    for record in records:
        why = None
        if not is_killed(record["outcome"]):
            why = explain(record)
            survivors.append({**{name: record[name] for name in ("file", "line", "operator", "diff")}, "why": why})
        for row in (rows[record["file"]], rows[str(Path(record["file"]).parent)]):
            row.update(tried=1, killed=is_killed(record["outcome"]), explained=why is not None)
    for file, total in totals.items():
        rows[str(Path(file).parent)].update(mutants=total)
    return {
        "rows": [
            {"file": file, **row, "killed_95": interval(row["killed"], row["tried"])} for file, row in rows.items()
        ],
        "ended": Counter(record["outcome"].split()[0] for record in records),
        "survivors": survivors,
    }


def interval(killed: int, tried: int) -> list[float] | None:
    """Wilson's interval of the share killed, were the tried ones drawn at random: 95 %."""
    if not tried:
        return None
    z = 1.959964
    centre, half = killed + z * z / 2, z * sqrt(killed * (tried - killed) / tried + z * z / 4)
    return [round((centre + sign * half) / (tried + z * z), 3) for sign in (-1, 1)]


def show(summary: dict[str, Any]) -> str:
    """The figures as a table."""
    heads = ("mutants", "tried", "killed", "explained")
    lines = [" " * 34 + "".join(f"{head:>10}" for head in heads)]
    for row in summary["rows"]:
        share = f"{row['killed'] / row['tried']:8.1%}" if row["tried"] else ""
        lines.append(f"{row['file']:34}" + "".join(f"{row[head]:>10}" for head in heads) + share)
    return "\n".join(lines)


def read_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.reliability.mutants",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--file", default="", help="only files whose path ends so")
    parser.add_argument("--sample", type=int, help="this many mutants of each group, drawn at random; all unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--budget", type=float, default=5.0, help="processor seconds of tests for one mutant")
    parser.add_argument("--fresh", action="store_true", help="begin the work file anew")
    parser.add_argument("--report", action="store_true", help="try nothing, tell all that the work file holds")
    parser.add_argument("--quick", action="store_true", help="ten mutants of the losses")
    parser.add_argument("--work", type=Path, default=Path("build/mutants.jsonl"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.groups, options.sample = ["losses"], 10
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = read_options(given)
    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    facts = describe_run(["python", "-m", "benchmarks.reliability.mutants", *given])
    work = Work(options.work, options.fresh)
    tried: set[str] = set()
    paths = [path for name in options.groups for path in GROUPS[name].paths() if str(path).endswith(options.file)]
    for name in () if options.report else options.groups:
        mutants = select([path for path in paths if path in GROUPS[name].paths()], options.sample, options.seed)
        begun = time.perf_counter()
        run_group(GROUPS[name], mutants, work, options.budget)
        print(f"{name}: {len(mutants)} mutants in {time.perf_counter() - begun:.0f} s", flush=True)
        tried |= {mutant.key for mutant in mutants}
    # what is told of earlier states of a file is passed over
    current = {path: {mutant.key for mutant in select([path], None, 0)} for path in paths}
    wanted = set().union(*current.values()) if options.report else tried
    records = [record for key, record in work.read().items() if key in wanted]
    totals = {str(path.relative_to(SOURCE)): len(keys) for path, keys in current.items()}
    summary = summarise(records, totals)
    print(show(summary))
    for survivor in summary["survivors"]:
        if not survivor["why"]:
            print(f"{survivor['file']}:{survivor['line']}", *survivor["diff"], sep="\n    ")
    print(write_results("reliability-mutants", {**facts, "seed": options.seed, **summary}, options.out))


if __name__ == "__main__":
    main()
