"""What the program that loads the server makes of right and wrong answers; the load itself is left to it."""

import asyncio
import os

import httpx
import pytest

from benchmarks.reliability import serving_load
from benchmarks.reliability.serving_service import make_roster
from tests.endpoint.service import running


@pytest.fixture(scope="module")
def service():
    with running(make_roster(), slots=4) as service:
        yield service


def test_a_small_load_is_counted(service, monkeypatch):
    monkeypatch.setattr(serving_load, "CASES", 4)
    options = serving_load.read_options(["--requests", "30", "--warm-up", "4", "--concurrency", "6"])
    found = asyncio.run(serving_load.measure(service.url, os.getpid(), options))
    assert sum(found["outcomes"].values()) == 30 and {name.split(": ")[1] for name in found["outcomes"]} == {"right"}
    assert set(found["outcomes"]) == {f"{kind}: right" for kind in serving_load.KINDS}
    assert found["tokens_per_second"] > 0 and found["memory_mib"]["end"] > 50


def test_wrong_answers_and_errors_are_told(service):
    async def ask():
        cases = serving_load.make_cases(0)[:1]
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            load = serving_load.Load(client, cases)
            load.expected = [("never said", "never said")]
            await load.ask("completion", 0)
            cases[0]["model"] = "nobody"
            await load.ask("chat stream", 0)
        return load.outcomes

    wrong, error = sorted(asyncio.run(ask()), reverse=True)
    assert wrong == "completion: WRONG" and error.startswith("chat stream: ERROR HTTPStatusError")
