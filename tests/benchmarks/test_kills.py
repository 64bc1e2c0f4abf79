"""The program that kills runs, in its small size."""

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_killed_runs_end_as_the_unkilled_one(tmp_path):
    command = [sys.executable, "-m", "benchmarks.reliability.kills", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.glob("reliability-kills-*.json")
    found = json.loads(file.read_text())
    assert found["kills"] == 2 and found["runs"] >= 1
    assert found["runs_that_differ"] == found["half_written_checkpoints"] == 0
    assert all(hit["phase"] for case in found["cases"] for hit in case["hits"])
