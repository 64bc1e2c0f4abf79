"""Ratios are taken within a turn, with quartiles; variants take turns in alternating order."""

import pytest

from benchmarks import measuring


@pytest.fixture
def clock(monkeypatch):
    """Seconds of a thread that does nothing but what the test says."""
    now = [0.0]
    monkeypatch.setattr(measuring.time, "thread_time", lambda: now[0])
    return now


def test_a_ratio_is_taken_within_a_turn(clock):
    """A machine that gets slower from turn to turn, threefold in the last, changes times and no ratio."""
    slowness = iter([1, 1, 1, 1, 1.5, 1.5, 2, 2, 6, 6])
    steps = {
        "one": lambda: clock.__setitem__(0, clock[0] + 0.010 * next(slowness)),
        "other": lambda: clock.__setitem__(0, clock[0] + 0.025 * next(slowness)),
    }
    found = measuring.compare(steps, "one", repeats=4)
    # turns 1, 1.5, 2, 6: the median lies between 1.5 and 2, the quartiles a quarter of the way on
    assert found["one"] == {
        "ms": 17.5,
        "ms_quartiles": [13.75, 30.0],
        "ratio": 1.0,
        "ratio_quartiles": [1.0, 1.0],
    }
    assert found["other"]["ms"] == 43.75
    assert found["other"]["ratio"] == 2.5 and found["other"]["ratio_quartiles"] == [2.5, 2.5]


def test_the_order_alternates_and_the_first_step_does_not_count():
    called = []
    steps = {name: lambda name=name: called.append(name) for name in "abc"}
    times = measuring.take_turns(steps, repeats=3)
    assert "".join(called) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_one_turn_has_no_spread():
    found = measuring.relate({"a": [2.0], "b": [3.0]}, "a", "mebibytes", "memory_ratio")
    assert found["b"] == {
        "mebibytes": 3.0,
        "mebibytes_quartiles": [3.0, 3.0],
        "memory_ratio": 1.5,
        "memory_ratio_quartiles": [1.5, 1.5],
    }


def test_a_row_holds_its_facts(capsys):
    rows = measuring.tabulate({"a": {"ms": 1.5, "ms_quartiles": [1, 2]}}, dtype="float32", batch=2)
    assert rows == [{"dtype": "float32", "batch": 2, "variant": "a", "ms": 1.5, "ms_quartiles": [1, 2]}]
    assert capsys.readouterr().out.split() == ["float32", "batch", "2", "a", "ms", "1.5"]
