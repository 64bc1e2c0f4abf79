"""Starts the processes of a run and ends with them: one message, one exit code, nobody left behind.

Each process finds its place in the variables that torchrun would set.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from mixora.errors import ConfigError
from mixora.training import lifeline
from mixora.training.interruption import SIGNALS
from mixora.training.processes import count_asked

SECONDS_BETWEEN_LOOKS = 0.05
SECONDS_TO_END = 30.0
FAULT = 1


@dataclass(frozen=True)
class Places:
    """So many `processes` on this machine, which is number `node` of `nodes`; `address` is HOST:PORT of number 0."""

    processes: int
    nodes: int = 1
    node: int = 0
    address: str | None = None

    def check(self) -> None:
        """`ConfigError` for places that cannot be."""
        if count_asked() > 1:
            raise ConfigError(
                f"processes: this is one of {count_asked()} already; valid: --processes without another launcher"
            )
        if self.node >= self.nodes:
            raise ConfigError(f"node-rank: got {self.node}; valid with --nodes {self.nodes}: 0 to {self.nodes - 1}")
        if self.nodes > 1 and self.address is None:
            raise ConfigError("address: is needed with several nodes; valid: HOST:PORT of node 0, the same on all")
        if self.address is not None and not self.address.rpartition(":")[2].isdigit():
            raise ConfigError(f"address: got {self.address!r}; valid: HOST:PORT, such as node0:29500")

    def environments(self) -> list[dict[str, str]]:
        """What each process of this machine finds."""
        host, _, port = (self.address or f"127.0.0.1:{_free_port()}").rpartition(":")
        common = {
            **os.environ,
            "WORLD_SIZE": str(self.processes * self.nodes),
            "LOCAL_WORLD_SIZE": str(self.processes),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        # else each would use all cores
        common.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.processes)))
        return [
            {**common, "RANK": str(self.node * self.processes + n), "LOCAL_RANK": str(n)} for n in range(self.processes)
        ]


def choose_places(processes: int | None, nodes: int, node: int, address: str | None) -> Places | None:
    """The places that are asked for, checked; None for one process without a launcher."""
    if processes is None:
        if (nodes, node, address) != (1, 0, None):
            raise ConfigError("nodes, node-rank, address: have no effect without --processes; valid: with it")
        return None
    places = Places(processes, nodes, node, address)
    places.check()
    return places


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def launch(command: Sequence[str], places: Places, tell: Callable[[str], None]) -> int:
    """Run `command` once for each of the places on this machine; gives the exit code.

    It is that of the first process if this failed, else that of the one that failed first; 1 for one that a signal
    ended, of which `tell` is told. The others are ended. Signals are handed on to all; where this process is killed,
    all are ended that `hold_on` to it.
    """
    started: list[subprocess.Popen[bytes]] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        _signal(started, number)

    previous = {number: signal.signal(number, hand_on) for number in SIGNALS}
    try:
        for environment in places.environments():
            # the first process alone reads and prints
            stream = None if environment["LOCAL_RANK"] == "0" else subprocess.DEVNULL
            started.append(lifeline.start(command, environment, stdin=stream, stdout=stream))
        return _wait(started, tell)
    finally:
        _end(started)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(started: Sequence[subprocess.Popen[bytes]], tell: Callable[[str], None]) -> int:
    """Until all have ended well, or one has not."""
    while True:
        codes = [process.poll() for process in started]
        failed = [(n, code) for n, code in enumerate(codes) if code]
        if failed:
            number, code = failed[0]
            if code < 0:
                name = signal.Signals(-code).name
                tell(f"process {number} of {len(started)} was ended by {name}; so the others are ended too")
            return code if code > 0 else FAULT
        if all(code == 0 for code in codes):
            return 0
        time.sleep(SECONDS_BETWEEN_LOOKS)


def _signal(started: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in started:
        if process.poll() is None:
            process.send_signal(number)


def _end(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Those that are left get time to end, then none."""
    _signal(started, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    for process in started:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
