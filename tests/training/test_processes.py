"""Two processes end as one would; what draws, what stops them, and what is refused."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import mixora
from benchmarks.reliability.data_parallel import list_cases, train
from mixora.cli import app
from mixora.errors import CheckpointError, ConfigError, TrainingError
from mixora.host import world
from mixora.losses import LoadBalance, ZLoss
from mixora.routing import Routing
from mixora.training import launcher, lifeline
from mixora.training.launcher import Places, choose_places, launch
from mixora.training.processes import check_processes, check_resumable
from mixora.training.run import fit
from mixora.training.run_config import read_run
from tests.training.test_run import quiet
from tests.training.two_ranks_run import tree_of


@pytest.mark.parametrize("case", list_cases(quick=True))
def test_two_processes_end_as_one_would(case, two_ranks, tmp_path):
    """Losses and weights after four steps; in the second one a process has nothing but padding."""
    expected, weights = train(tmp_path, **list_cases(quick=True)[case])
    found, weights_there = two_ranks["recipes"][case]
    assert expected["moved"] > 1e-4
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-6)
    assert found["balance"] == pytest.approx(expected["balance"], rel=2e-6)
    assert weights_there.keys() == weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(weights_there[name], tensor, rtol=0, atol=1e-6, msg=name)


def test_some_experts_got_no_token_of_a_process(two_ranks):
    assert all(two_ranks["recipes"][name][0]["idle"] > 0 for name in ("sira", "mola", "pesc", "mixlora", "adamoe"))


def test_masks_differ_between_processes_and_routes_do_not(two_ranks):
    """Both see the same rows, so what their losses differ by is what they drew."""
    for name, (losses, weights) in two_ranks["draws"].items():
        is_alike = torch.equal(*losses)
        assert is_alike == (name in ("nothing", "routes")), name
        assert torch.equal(*weights), name


def test_a_run_of_two_processes_is_that_of_one(two_ranks, tmp_path):
    found = two_ranks["run"]
    record = fit(read_run(tree_of(two_ranks["folder"], tmp_path / "out", 4)), quiet())
    assert (record.environment["processes"], found["processes"]) == (1, 2)
    assert found["losses"] == pytest.approx([line["loss"] for line in record.history], rel=1e-6)
    weights = load_file(tmp_path / "out" / "adapter" / "adapter_model.safetensors")
    assert weights.keys() == found["weights"].keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=0, atol=1e-6, msg=name)


def test_a_signal_to_one_process_stops_all_and_the_run_goes_on(two_ranks):
    found = two_ranks["run"]
    assert all(torch.equal(found["resumed"][name], tensor) for name, tensor in found["weights"].items())


def routing_of(logits_TE, valid_T):
    probs_TE = logits_TE.softmax(dim=-1)
    weights_TK, experts_TK = probs_TE.topk(2)
    assigned_TK = valid_T[:, None].expand_as(experts_TK)
    return Routing(experts_TK, weights_TK, assigned_TK, assigned_TK, valid_T, 5, logits_TE, probs_TE)


@pytest.mark.parametrize("loss", [LoadBalance(LoadBalance.Config(coefficient=1.0)), ZLoss(ZLoss.Config(coefficient=1))])
def test_sums_of_parts_give_the_loss_of_the_whole(loss):
    """A mean over the parts of their losses is something else."""
    logits_TE = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    valid_T = torch.arange(12) % 5 != 0
    whole = loss.of_site(routing_of(logits_TE, valid_T))
    parts = [loss.add_up(routing_of(logits_TE[rows], valid_T[rows])) for rows in (slice(0, 3), slice(3, 12))]
    torch.testing.assert_close(loss.conclude(*[a + b for a, b in zip(*parts, strict=True)]), whole)
    assert not torch.isclose(sum(loss.conclude(*part) for part in parts) / 2, whole)


def test_one_process_adds_nothing_up():
    tensor = torch.ones(2)
    assert world.sum_over_processes({"a": tensor})["a"] is tensor
    assert (world.count_processes(), world.process_index()) == (1, 0)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_several_processes_that_train_alone_are_refused(name, monkeypatch):
    monkeypatch.setenv(name, "4")
    with pytest.raises(
        TrainingError, match=r"4 were started, but each trains alone; valid: mixora train --processes N"
    ):
        check_processes()


def test_what_accelerate_starts_with_a_cpu_is_refused(monkeypatch):
    """It starts one process, whatever number it is asked for."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_processes()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(
        TrainingError, match=r"asked for several, but started one, as it does with --cpu; valid: .*multi_gpu"
    ):
        check_processes()


def test_trainers_refuse_too(monkeypatch, tmp_path):
    monkeypatch.setattr(mixora.training.trainers, "check_processes", lambda: (_ for _ in ()).throw(TrainingError("no")))
    with pytest.raises(TrainingError):
        train(tmp_path, "lora")


def test_a_checkpoint_of_two_processes_needs_two(tmp_path):
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()
    with pytest.raises(CheckpointError, match="was written by 2 processes, and this run has 1; valid: as many"):
        check_resumable(tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (Places(2, nodes=2), "address: is needed with several nodes; valid: HOST:PORT"),
        (Places(2, nodes=2, node=2, address="a:1"), "node-rank: got 2; valid with --nodes 2: 0 to 1"),
        (Places(2, address="somewhere"), "address: got 'somewhere'; valid: HOST:PORT"),
    ],
)
def test_places_that_cannot_be(places, message):
    with pytest.raises(ConfigError, match=message):
        places.check()


def test_no_launcher_inside_of_another(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="this is one of 2 already; valid: --processes without another launcher"):
        Places(2).check()


def test_what_processes_of_a_second_machine_find():
    found = Places(2, nodes=3, node=1, address="first:29500").environments()
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    assert [[place[name] for name in names] for place in found] == [
        ["2", "0", "6", "2", "first", "29500"],
        ["3", "1", "6", "2", "first", "29500"],
    ]


WAIT = "import time; time.sleep(60)"


@pytest.mark.parametrize(
    ("first", "second", "code", "told"),
    [
        ("pass", "pass", 0, ""),
        ("raise SystemExit(2)", WAIT, 2, ""),
        (WAIT, "raise SystemExit(130)", 130, ""),
        (WAIT, "import os; os.kill(os.getpid(), 9)", 1, "process 1 of 2 was ended by SIGKILL"),
    ],
)
def test_one_that_fails_ends_the_others(first, second, code, told):
    started, said = time.monotonic(), []
    script = f"import os\nexec({first!r} if os.environ['RANK'] == '0' else {second!r})"
    assert launch([sys.executable, "-c", script], Places(2), said.append) == code
    assert told in "".join(said) and len(said) == bool(told)
    assert time.monotonic() - started < 20


def test_one_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr(launcher, "SECONDS_TO_END", 0.2)
    stubborn = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    script = f"import os, time\nexec({stubborn!r} if os.environ['RANK'] == '0' else 'time.sleep(1); 1 / 0')"
    assert launch([sys.executable, "-c", script], Places(2), print) == 1


def test_none_outlives_a_launcher_that_was_killed(tmp_path):
    held = (
        "import os, pathlib, signal, sys, time\n"
        "from mixora.training.lifeline import hold_on\n"
        f"mark = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "signal.signal(signal.SIGTERM, lambda *_: (mark.write_text('ended'), sys.exit()))\n"
        "hold_on()\n"
        "mark.touch()\n"
        "time.sleep(60)\n"
    )
    script = (
        "import sys\n"
        "from mixora.training.launcher import Places, launch\n"
        f"launch([sys.executable, '-c', {held!r}], Places(2), print)\n"
    )

    def told():
        return [path.read_text() for path in sorted(tmp_path.iterdir())]

    launched = subprocess.Popen([sys.executable, "-c", script])
    try:
        wait_until(lambda: told() == ["", ""])
        assert launched.poll() is None
    finally:
        launched.kill()
        launched.wait()
    wait_until(lambda: told() == ["ended", "ended"])


def wait_until(is_so, seconds=60):
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_signal_reaches_each_process_once(tmp_path):
    script = (
        "import os, pathlib, signal, sys, time\n"
        f"mark = pathlib.Path({str(tmp_path)!r}) / os.environ['RANK']\n"
        "seen = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: seen.append(1))\n"
        "mark.touch()\n"
        "while not seen: time.sleep(0.01)\n"
        "time.sleep(0.3)\n"
        "mark.write_text(str(len(seen)))\n"
    )

    def send():
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=send)
    thread.start()
    assert launch([sys.executable, "-c", script], Places(2), print) == 0
    thread.join()
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["1", "1"]


COMMAND = """
import mixora_command, os, time
from mixora.commands import terminal
from mixora.errors import DataError

@terminal.reports_errors
def command():
    if os.environ["RANK"] in FAILING:
        raise DataError("no rows")
    time.sleep(60)

terminal.SECONDS_TO_BE_ENDED = DELAY
try:
    command()
except terminal.typer.Exit as end:
    raise SystemExit(end.exit_code)
"""


@pytest.mark.parametrize(
    ("failing", "delay", "told"), [("01", 30, "error: no rows"), ("1", 0, "error in process 1: no rows")]
)
def test_a_mistake_is_told_once(failing, delay, told, capfd):
    script = COMMAND.replace("FAILING", repr(failing)).replace("DELAY", str(delay))
    assert launch([sys.executable, "-c", script], Places(2), print) == 2
    assert capfd.readouterr().err.strip() == told


def test_places_without_processes_are_a_mistake():
    assert choose_places(None, 1, 0, None) is None
    assert choose_places(2, 1, 0, None) == Places(2)
    with pytest.raises(ConfigError, match="nodes, node-rank, address: have no effect without --processes"):
        choose_places(None, 2, 0, None)
    with pytest.raises(ConfigError, match="node-rank: got 1"):
        choose_places(2, 1, 1, None)


def test_each_process_is_given_the_words_of_the_command(tmp_path, monkeypatch):
    given, held = [], []
    monkeypatch.setattr(launcher, "launch", lambda *words: given.append(words) or 3)
    monkeypatch.setattr(lifeline, "hold_on", lambda: held.append(True))
    words = ["model.base=tiny", "data.source=rows", "out=run"]
    result = CliRunner().invoke(app, ["train", *words, "--recipe", "sira", "--processes", "2", "--overwrite"])
    assert result.exit_code == 3, result.output
    ((command, places, _),) = given
    assert places == Places(2) and held
    assert command == [sys.executable, "-m", "mixora", "train", *words, "--overwrite", "--recipe=sira"]
