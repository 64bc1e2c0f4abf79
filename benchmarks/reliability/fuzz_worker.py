"""A process of `benchmarks.reliability.fuzz`: gives a target inputs under limits and counts what comes of them."""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

NOTE_EVERY = 50
MOST_BYTES = 4096


class TooSlow(BaseException):
    """An input takes too long; no `Exception`, so that nobody catches it."""


class Worker:
    """Counts outcomes and keeps findings, one for each kind and place, in files that outlive the process."""

    def __init__(self, asked: dict[str, Any], run: Callable[[bytes], None], refusal: type[Exception]) -> None:
        self.asked, self.run, self.refusal = asked, run, refusal
        self.folder = Path(asked["folder"])
        self.count, self.slowest = 0, 0.0
        self.outcomes: Counter[str] = Counter()
        self.findings: dict[tuple[str, str], dict[str, str]] = {}
        self.current = (self.folder / "current").open("wb", buffering=0)

    def give(self, data: bytes) -> None:
        """One input; the process ends with the last one."""
        if self.count >= self.asked["inputs"]:
            self.note()
            os._exit(0)
        self.current.seek(0)
        self.current.truncate()
        self.current.write(data)
        begun = time.monotonic()
        self.outcomes[self._try(data)] += 1
        self.slowest = max(self.slowest, round(time.monotonic() - begun, 2))
        self.count += 1
        if self.count % NOTE_EVERY == 0 or self.slowest > 1:
            self.note()

    def _try(self, data: bytes) -> str:
        signal.setitimer(signal.ITIMER_REAL, self.asked["seconds"])
        try:
            self.run(data)
        except self.refusal as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            return self._find("memory", error, data) if _is_for_memory(error) else type(error).__name__
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            signal.setitimer(signal.ITIMER_REAL, 0)
            return self._find("finding", error, data)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return "result"

    def _find(self, outcome: str, error: BaseException, data: bytes) -> str:
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)]
        ours = [place for place in places if not place.startswith(("fuzz_worker", "pathlib"))]
        kind = f"{outcome}: {type(error).__name__}"
        finding = {"kind": kind, "text": str(error)[:500], "at": " ".join(ours[-6:]), "input": data[:2000].hex()}
        self.findings.setdefault((kind, " ".join(ours[:3])), finding)
        return outcome

    def note(self) -> None:
        """What is known so far, for the process that reads it."""
        told = {"outcomes": self.outcomes, "findings": list(self.findings.values()), "slowest": self.slowest}
        (self.folder / "tally.new").write_text(json.dumps(told))
        (self.folder / "tally.new").rename(self.folder / "tally")
        (self.folder / "count").write_text(str(self.count))


def _is_for_memory(error: BaseException | None) -> bool:
    """Whether there was not enough memory behind a refusal, which has to come before memory is asked for."""
    while error is not None:
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def mutations(seeds: list[bytes], seed: int) -> Iterator[bytes]:
    """The seeds, then without end what comes of changing them, or bytes at random."""
    yield from seeds
    draw = random.Random(seed)
    while True:
        if not seeds or draw.random() < 0.1:
            yield draw.randbytes(draw.randrange(200))
            continue
        found = bytearray(draw.choice(seeds)[:100_000])
        for _ in range(draw.randrange(1, 6)):
            place, kind = draw.randrange(len(found) + 1), draw.randrange(4)
            if kind == 0:
                del found[place : place + draw.randrange(9)]
            elif kind == 1:
                found[place:place] = draw.randbytes(draw.randrange(4))
            elif kind == 2:
                found[place:place] = draw.choice(seeds)[: draw.randrange(80)]
            elif place < len(found):
                found[place] ^= 1 << draw.randrange(8)
        yield bytes(found)


def _limit_memory(more: int) -> None:
    """Of this process: what it has and so many MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + more * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size, hard))


def _quieten(folder: Path) -> None:
    """No words of libraries; what they keep goes into the folder."""
    import transformers

    from mixora.data import encoding

    os.environ["MIXORA_CACHE"] = str(folder / "cache")
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    encoding.logger.disabled = True


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooSlow("an input takes too long")


def work(asked: dict[str, Any], target: Any) -> NoReturn:
    """Give `target` inputs until this process ends."""
    from mixora.errors import MixoraError

    _quieten(Path(asked["folder"]))
    worker, seeds = Worker(asked, target.run, MixoraError), target.seeds()
    signal.signal(signal.SIGALRM, _stop)
    # what is made once is made before memory counts
    worker._try(b"")
    _limit_memory(asked["memory"])
    if asked["engine"] == "mutation":
        for data in mutations(seeds, asked["seed"]):
            worker.give(data)
    import atheris

    corpus = worker.folder / "corpus"
    corpus.mkdir()
    for number, content in enumerate(seeds):
        (corpus / str(number)).write_bytes(content[:MOST_BYTES])
    flags = [f"-seed={asked['seed'] + 1}", f"-max_len={MOST_BYTES}", "-verbosity=0"]
    flags += ["-handle_alrm=0", "-timeout=100000", "-rss_limit_mb=0", "-len_control=0", "-detect_leaks=0"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], worker.give)
    atheris.Fuzz()
    os._exit(0)
