"""Real runs in processes of their own: what they leave, and the same results on a Ray cluster."""

import importlib.util
import json
import sys

import pytest
from typer.testing import CliRunner

from mixora.cli import app
from mixora.comparison.cluster import make_cluster
from mixora.comparison.local import Local
from mixora.comparison.matrix import make_matrix
from mixora.comparison.queue import work_through
from mixora.comparison.settings import read_comparison
from mixora.errors import ConfigError
from tests.comparison.conftest import Pretend, quiet
from tests.training.conftest import bases, command_rows, data  # noqa: F401 - fixtures

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="package ray is not installed")


@pytest.fixture(scope="module")
def cluster():
    """A cluster of one machine with one core, as another process would have started it."""
    from ray.cluster_utils import Cluster

    patch = pytest.MonkeyPatch()
    # its processes find the same modules as this one
    patch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    started = Cluster(initialize_head=True, head_node_args=head)
    patch.undo()
    yield started
    started.shutdown()


@pytest.fixture(scope="module")
def run_by(bases, tmp_path_factory):  # noqa: F811
    """Makes one run with a launcher, in a folder of its own."""
    root = tmp_path_factory.mktemp("launched")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in command_rows(20)))

    def run(make_launcher):
        tree = {
            "model": {"base": str(bases / "llama")},
            "data": {"source": str(root / "rows.jsonl")},
            "methods": ["molora"],
            "seeds": [3],
            "train": {"steps": 2, "batch_size": 4},
            "evaluate": {"limit": 2, "max_new_tokens": 1},
            "out": str(tmp_path_factory.mktemp("out")),
        }
        matrix = make_matrix(read_comparison(tree))
        assert work_through(matrix, matrix.runs, make_launcher, quiet()) == {}
        return matrix.runs[0]

    return run


@pytest.fixture(scope="module")
def made_locally(run_by):
    return run_by(lambda: Local(1, 1, ()))


@pytest.mark.slow
def test_a_process_makes_a_whole_run(made_locally):
    record = made_locally.record()
    assert set(record.after) >= {"loss", "exact_match"} and record.after["loss"] != record.before["loss"]
    assert record.environment["train_seconds"] > 0 and record.environment["train_tokens_per_second"] > 0
    assert record.environment["peak_memory_mib"] > 100 and record.environment["device"] == "CPU, 1 threads"
    assert (made_locally.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert "read back" in (made_locally.folder.parents[3] / "queue/rows/molora/seed-3.log").read_text()


@needs_ray
@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_results(run_by, made_locally, cluster):
    ours, theirs = made_locally.record(), run_by(lambda: make_cluster(cluster.address, None, None)).record()
    assert theirs.after == ours.after and theirs.history == ours.history
    assert theirs.environment["device"] == ours.environment["device"]


@needs_ray
def test_a_cluster_is_used_as_far_as_it_goes(cluster):
    import ray

    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        found = make_cluster("auto", None, None)
        assert (found.threads, found.gpus, found.workers, found.is_ours) == (1, 0, None, False)
        with pytest.raises(ConfigError, match="threads: got 9; valid: at most 1"):
            make_cluster("auto", None, 9)
    finally:
        ray.shutdown()


def test_without_ray_and_without_a_cluster(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r'valid: pip install "mixora\[ray\]"'):
        make_cluster("auto", None, None)


@needs_ray
def test_no_cluster_at_the_address(monkeypatch):
    def fail(**settings):
        raise ConnectionError("nobody there")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ConfigError, match=r"address: got 'auto', where no Ray cluster answers: nobody there"):
        make_cluster("auto", None, None)


def test_the_dry_run_writes_nothing(tree, tmp_path):
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(tree))
    shown = CliRunner().invoke(app, ["compare", str(file), "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "2 runs: 2 methods x seeds 0 x data commands; 0 are finished" in shown.output
    assert "budget 7,168" in shown.output and "7,168 (+0.0%)" in shown.output
    plan = json.loads(CliRunner().invoke(app, ["compare", str(file), "seeds=2", "--dry-run", "--json"]).output)
    assert len(plan["runs"]) == 4 and plan["missing"] == plan["runs"]
    assert plan["matched"]["commands"][1]["adapter"]["allocator.budget"] == 7168
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["seeds=0"], "greater than or equal to 1"),
        (["--launcher", "ray", "--devices", "0"], "devices: has no effect with --launcher ray"),
        (["--devices", "0"], "devices: got 0; valid here: none"),
        (["match.tolerance=0.0001"], "sira cannot be; it reaches"),
    ],
)
def test_a_users_mistake_is_one_message(tree, words, message, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    file = tmp_path / "compare.json"
    file.write_text(json.dumps(tree))
    result = CliRunner().invoke(app, ["compare", str(file), *words])
    assert result.exit_code == 2 and message in " ".join(result.output.split())


def test_the_command_makes_what_is_missing_and_tells_it(tree, tmp_path, monkeypatch):
    file = tmp_path / "compare.json"
    file.write_text(json.dumps({**tree, "match": None}))
    failing = ["commands/sira/seed-0"]
    monkeypatch.setattr("mixora.comparison.local.make_local", lambda **_: Pretend(failing))
    told = CliRunner().invoke(app, ["compare", str(file)])
    assert told.exit_code == 2 and f"page  {tmp_path / 'out'}" in "".join(told.output.split("\n"))
    assert "1 of 2 runs failed: commands/sira/seed-0; their logs lie in" in " ".join(told.output.split())
    failing.clear()
    done = CliRunner().invoke(app, ["compare", str(file), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["runs"]) == 2 and found["failed"] == {} and found["missing"] == []
