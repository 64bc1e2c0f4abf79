"""Runs tests against mutants, each in a fork of a process that has imported and collected all it needs.

A change inside a function that tests reach takes the place of the code of the living function: what it costs is a fork
and these tests. Other changes are tried in a fork that imports the package anew.
"""

import gc
import importlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.abc import MetaPathFinder
from importlib.machinery import SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.internal.conjecture import providers

from benchmarks.reliability.mutation import Mutant

OPTIONS = [
    "-q",
    "-s",
    "-p",
    "no:cacheprovider",
    "-p",
    "no:hypothesispytest",
    "--assert=plain",
    "-o",
    "timeout=0",
    "--tb=short",
]
OURS = ("mixora", "tests", "benchmarks", "__main__")
Living = dict[tuple[str, str, int], list[FunctionType]]
Tell = Callable[[Mutant, str, float], None]
IN_PLACE_IMPOSSIBLE = "impossible in place"


def attempt(work: Callable[[], str], seconds: float, is_silent: bool = True) -> str:
    """What `work` gives in a fork of this process; `timeout`, or `crash` where the fork ends otherwise.

    A silent one is a trial: what it started ends with it.
    """
    reading, writing = os.pipe()
    # what is there is not looked through again in each fork
    gc.freeze()
    child = os.fork()
    if not child:
        try:
            # of the processor's time, so that a busy machine changes nothing; what waits for good ends too
            signal.setitimer(signal.ITIMER_PROF, seconds)
            signal.setitimer(signal.ITIMER_REAL, 30 * seconds)
            if is_silent:
                os.setpgid(0, 0)
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, 1)
                os.dup2(null, 2)
            said = work().encode()
            while said:
                said = said[os.write(writing, said) :]
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        given = pipe.read()
    _, status = os.waitpid(child, 0)
    if is_silent:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF) else "crash"
    return "crash" if status else given


@dataclass
class Reach:
    """What the unchanged tests do: processor seconds of each, lines of each file that it runs, modules imported."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    modules: list[str] = field(default_factory=list)

    def reaches(self, mutant: Mutant) -> bool:
        """Whether a test runs a line of the mutant's function; the others may be run by what is imported."""
        path, body = str(mutant.path), set(mutant.body)
        return any(body.intersection(lines.get(path, ())) for lines in self.lines.values())

    def tests_for(self, mutant: Mutant, kills: dict[str, int], budget: float) -> list[str]:
        """The tests that run a line of the mutant's function, or all if none does, the sharpest first.

        Those whose time goes beyond `budget` seconds, all together, are left out.
        """
        path, body = str(mutant.path), set(mutant.body)
        reaching = [name for name in self.seconds if body.intersection(self.lines[name].get(path, ()))]
        on_line = {name for name in reaching if mutant.line in self.lines[name].get(path, ())}
        names = sorted(
            reaching or self.seconds,
            key=lambda name: (name not in on_line, -kills.get(name, 0), self.seconds[name]),
        )
        spent = itertools.accumulate(self.seconds[name] for name in names)
        return [name for name, seconds in zip(names, spent, strict=True) if seconds <= budget]


class _Runner:
    """A plugin of pytest that does with the collected tests what `work` says."""

    def __init__(self, work: Callable[["_Runner"], str]) -> None:
        self.work, self.said = work, "crash"
        self.items: dict[str, pytest.Item] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            self.said = "killed while collecting"
            return True
        self.items = {item.nodeid: item for item in session.items}
        self.said = self.work(self)
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception):
            raise _Failed(item.nodeid)  # without the work of telling how

    def run(self, names: Sequence[str]) -> str:
        """Run tests up to the first that fails."""
        items = [self.items[name] for name in names if name in self.items]
        try:
            for item, following in zip(items, [*items[1:], None], strict=True):
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        except _Failed as failed:
            return f"killed by {failed}"
        return "survived"


class _Failed(BaseException):
    """Passes through pytest."""


def with_tests(tests: Iterable[str], work: Callable[[_Runner], str]) -> str:
    """Import and collect the tests in this process, then do `work`."""
    settings.register_profile("mutants", derandomize=True, database=None, deadline=None)
    settings.load_profile("mutants")
    # half a second in each fork: it would look for numbers to try in the source of all modules
    providers.is_local_module_file = lambda file: False
    runner = _Runner(work)
    code = pytest.main([*OPTIONS, *tests], plugins=[runner])
    return "killed while collecting" if code and runner.said == "crash" else runner.said


def find_reach(tests: Sequence[str], paths: Iterable[Path]) -> Reach:
    """Run the unchanged tests, and import here what they import."""
    wanted = {str(path.resolve()): str(path) for path in paths}
    found = attempt(lambda: with_tests(tests, lambda runner: _observe(runner, wanted)), 900, is_silent=False)
    if not found.startswith("{"):
        raise SystemExit(f"the unchanged tests do not pass: {found}")
    reach = Reach(**json.loads(found))
    for name in reach.modules:
        # some can be imported only as part of others
        with suppress(Exception):
            importlib.import_module(name)
    return reach


def _observe(runner: _Runner, wanted: dict[str, str]) -> str:
    reach = Reach()
    for name in runner.items:
        with _tracing(wanted) as lines:
            begun = time.process_time()
            said = runner.run([name])
        if said != "survived":
            return said
        reach.seconds[name] = time.process_time() - begun
        reach.lines[name] = {path: sorted(numbers) for path, numbers in lines.items()}
    reach.modules = [name for name in sys.modules if name.split(".")[0] not in OURS]
    return json.dumps(vars(reach))


@contextmanager
def _tracing(wanted: dict[str, str]) -> Iterator[dict[str, set[int]]]:
    lines: dict[str, set[int]] = defaultdict(set)

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        path = wanted.get(frame.f_code.co_filename)
        if path is None:
            return None
        numbers = lines[path]

        def step(frame: FrameType, event: str, argument: Any) -> Any:
            numbers.add(frame.f_lineno)
            return step

        return step

    sys.settrace(enter)
    try:
        yield lines
    finally:
        sys.settrace(None)


def try_in_place(
    tests: Sequence[str], mutants: Sequence[Mutant], choose: Callable[[Mutant], list[str]], limit: Callable, tell: Tell
) -> str:
    """Tell of each mutant what became of it, or that it cannot be put in place."""

    def work(runner: _Runner) -> str:
        living = _living({str(mutant.path.resolve()) for mutant in mutants})
        for mutant in mutants:
            names, begun = choose(mutant), time.perf_counter()

            def trial(mutant: Mutant = mutant, names: list[str] = names) -> str:
                return runner.run(names) if _replace(mutant, living) else IN_PLACE_IMPOSSIBLE

            tell(mutant, attempt(trial, limit(names)), time.perf_counter() - begun)
        return "done"

    return with_tests(tests, work)


def _living(paths: set[str]) -> Living:
    """The functions of these files that exist, by file, name and first line; before they are frozen."""
    living: Living = defaultdict(list)
    for thing in gc.get_objects():
        if type(thing) is FunctionType and thing.__code__.co_filename in paths:
            code = thing.__code__
            living[code.co_filename, code.co_qualname, code.co_firstlineno].append(thing)
    return living


def _replace(mutant: Mutant, living: Living) -> bool:
    """Give the living function the mutant's code, if there is such a function and it closes over as many names."""
    assert mutant.function is not None
    path = str(mutant.path.resolve())
    codes = _codes(compile(mutant.source, path, "exec"))
    fitting = [code for code in codes if (code.co_qualname, code.co_firstlineno) == mutant.function]
    functions = living.get((path, *mutant.function), [])
    if not fitting or not functions:
        return False
    for function in functions:
        if len(function.__code__.co_freevars) != len(fitting[0].co_freevars):
            return False
        function.__code__ = fitting[0]
    return True


def _codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def try_anew(mutant: Mutant, module: str, names: Sequence[str], limit: float) -> str:
    """What becomes of a mutant where the package is imported anew with it."""

    def work() -> str:
        sys.meta_path.insert(0, _Finder(mutant, module))
        return with_tests(sorted({name.split("::")[0] for name in names}), lambda runner: runner.run(names))

    return attempt(work, limit)


class _Loader(SourceFileLoader):
    def __init__(self, module: str, mutant: Mutant) -> None:
        super().__init__(module, str(mutant.path.resolve()))
        self.mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.mutant.source, self.path, "exec")


class _Finder(MetaPathFinder):
    """Gives one module the mutant's source."""

    def __init__(self, mutant: Mutant, module: str) -> None:
        self.mutant, self.module = mutant, module

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != self.module:
            return None
        file = self.mutant.path.resolve()
        within = [str(file.parent)] if file.name == "__init__.py" else None
        loader = _Loader(fullname, self.mutant)
        return spec_from_file_location(fullname, file, loader=loader, submodule_search_locations=within)
