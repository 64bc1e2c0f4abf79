"""Processes: a stand-in for the interpreter where only starting and stopping matter, real runs where results do."""

import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from mixora.comparison import execution, local, queue
from mixora.comparison.execution import Execution, Job, execute
from mixora.comparison.local import Local, make_local
from mixora.comparison.queue import work_through
from mixora.environment.machine import count_cores
from mixora.errors import ConfigError
from tests.comparison.conftest import quiet


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a shell script take the place of the Python that trains."""

    def install(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(execution.sys, "executable", str(path))

    return install


def make_jobs(folder, count):
    return [Job(f"run-{n}", f"{n}.yaml", f"{n}.log", str(folder), threads=3) for n in range(count)]


def wait_for(path):
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_each_worker_has_its_device_and_its_threads(stand_in, tmp_path):
    stand_in('echo "$@ $OMP_NUM_THREADS $CUDA_VISIBLE_DEVICES"; sleep 0.3')
    outcomes = list(Local(workers=2, threads=3, devices=("5", "7")).launch(make_jobs(tmp_path, 4)))
    assert {outcome.name for outcome in outcomes} == {f"run-{n}" for n in range(4)}
    assert all(outcome.problem is None and outcome.seconds >= 0.3 for outcome in outcomes)
    told = [(tmp_path / f"{n}.log").read_text().split() for n in range(4)]
    assert told[0] == ["-m", "mixora.cli", "train", "0.yaml", "--overwrite", "3", "5"]
    assert [words[-1] for words in told[:2]] == ["5", "7"] and {words[-1] for words in told} == {"5", "7"}


def test_a_failed_run_shows_the_end_of_its_log_and_others_go_on(stand_in, tmp_path):
    stand_in('[ "$4" = 1.yaml ] || exit 0; seq 30; echo; echo "error: no such file" >&2; exit 2')
    outcomes = {o.name: o.problem for o in Local(1, 1, ()).launch(make_jobs(tmp_path, 3))}
    assert outcomes["run-0"] is None and outcomes["run-2"] is None
    assert outcomes["run-1"].splitlines() == [*map(str, range(20, 31)), "error: no such file"]
    stand_in("exit 3")
    assert execute(make_jobs(tmp_path, 1)[0]).problem == "it ended with code 3 and wrote nothing"


def test_runs_end_where_the_iteration_does(stand_in, tmp_path):
    stand_in(
        'trap "touch saved-$4; exit 130" INT; touch began-$4; [ "$4" = 0.yaml ] && exit 0; while :; do sleep 0.02; done'
    )
    outcomes = Local(2, 1, ()).launch(make_jobs(tmp_path, 3))
    assert next(outcomes).name == "run-0"
    wait_for(tmp_path / "began-1.yaml")
    outcomes.close()
    # asked to stop, it had the time to save
    assert (tmp_path / "saved-1.yaml").exists()


def test_a_run_that_does_not_stop_is_ended(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(execution, "GRACE", 0.2)
    stand_in('trap "" INT; touch began; while :; do sleep 0.02; done')
    run = Execution(make_jobs(tmp_path, 1)[0])
    run.start()
    wait_for(tmp_path / "began")
    run.interrupt()
    run.end()
    assert run.poll().problem == f"it ended with code -{int(signal.SIGKILL)} and wrote nothing"


def test_sigterm_stops_the_runs_as_ctrl_c_does(stand_in, build, tmp_path):
    # the run tells its parent to end, as a cluster would
    told = f"echo $$ > {tmp_path}/number; kill -TERM {os.getpid()}"
    stand_in(f'trap "touch {tmp_path}/saved; exit 130" INT; {told}; while :; do sleep 0.02; done')
    matrix = build()
    with pytest.raises(KeyboardInterrupt):
        work_through(matrix, matrix.runs, lambda: Local(1, 1, ()), quiet())
    assert (tmp_path / "saved").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "number").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_all_that_is_given_is_used(monkeypatch):
    cores = count_cores()
    assert make_local(None, None, None) == Local(1, cores, ())
    assert make_local(2 * cores, None, None) == Local(2 * cores, 1, ())
    assert make_local(1, 5, None) == Local(1, 5, ())
    with pytest.raises(ConfigError, match="devices: got 0,1; valid here: none"):
        make_local(None, None, "0,1")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(local.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(local.torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(local, "count_cores", lambda: 12)
    assert make_local(None, None, None) == Local(3, 4, ("0", "1", "2"))
    assert make_local(None, None, "2, 1") == Local(2, 6, ("2", "1"))
    assert make_local(4, None, "0") == Local(4, 3, ("0",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert make_local(None, None, None).devices == ("GPU-a", "GPU-b")


def test_an_interrupt_while_a_process_starts_comes_once_it_is_known():
    with pytest.raises(KeyboardInterrupt):
        with execution.hold_signals():
            signal.raise_signal(signal.SIGINT)
            reached = True
        pytest.fail("the signal was lost")
    assert reached and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_can_be_interrupted_where_its_parent_cannot(stand_in, tmp_path):
    stand_in('trap "touch saved; exit 130" INT; touch began; while :; do sleep 0.02; done')
    run = Execution(make_jobs(tmp_path, 1)[0])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        run.start()
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == {signal.SIGINT}
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    wait_for(tmp_path / "began")
    run.interrupt()
    run.end()
    assert (tmp_path / "saved").exists()


def test_a_thread_beside_the_main_one_leaves_signals_alone():
    """Only the main one may set handlers."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with ThreadPoolExecutor(1) as pool:

        def enter(block):
            with block():
                return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

        for block in (execution.hold_signals, queue._sigterm_interrupts):
            assert pool.submit(enter, block).result() == before


def test_what_never_started_is_at_its_end(tmp_path):
    run = Execution(make_jobs(tmp_path, 1)[0])
    run.interrupt()
    run.end()
    assert run.poll() is None
