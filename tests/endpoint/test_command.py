"""`mixora serve`, from folders to a signal."""

import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress

import httpx
import pytest
from typer.testing import CliRunner

from mixora.answering.rows import Decoder
from mixora.cli import app
from mixora.commands import serving
from tests.answering.conftest import saved  # noqa: F401 - a fixture


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_a_signal(saved, number):  # noqa: F811
    port, found = free_port(), []

    def ask_and_end():
        try:
            while not found:
                time.sleep(0.02)
                try:
                    found.append(httpx.get(f"http://127.0.0.1:{port}/v1/models", headers={"authorization": "Bearer k"}))
                except httpx.ConnectError:
                    continue
            body = {"model": "red", "prompt": "lamp", "max_tokens": 3}
            found.append(httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body))
        finally:
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask_and_end)
    thread.start()
    command = ["serve", str(saved / "red"), f"second={saved / 'blue'}", "--port", str(port), "--api-key", "k"]
    result = CliRunner().invoke(app, command)
    thread.join()
    assert result.exit_code == 0, result.output
    assert [model["id"] for model in found[0].json()["data"]] == ["tiny", "red", "second"]
    assert found[1].status_code == 401
    told = " ".join(result.stderr.split())
    assert f"http://127.0.0.1:{port}/v1 serves tiny, red, second" in told and told.endswith("stopped")
    assert "warning" not in told


def test_answers_that_take_longer_than_the_end_are_told_so(saved, monkeypatch):  # noqa: F811
    port, told, advance = free_port(), {}, Decoder.advance
    monkeypatch.setattr(serving, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(Decoder, "advance", lambda *given: time.sleep(0.1) or advance(*given))

    def ask(stream):
        body = {"model": "red", "prompt": "lamp", "max_tokens": 100, "temperature": 0, "stream": stream}
        told[stream] = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)

    def ask_and_end():
        until = time.monotonic() + 60
        try:
            while not told:
                assert time.monotonic() < until
                time.sleep(0.02)
                with suppress(httpx.ConnectError):
                    told["health"] = httpx.get(f"http://127.0.0.1:{port}/health")
            asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
            for thread in asking:
                thread.start()
            while "mixora_running 2.0" not in httpx.get(f"http://127.0.0.1:{port}/metrics").text:
                assert time.monotonic() < until
                time.sleep(0.02)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        for thread in asking:
            thread.join()

    thread = threading.Thread(target=ask_and_end)
    thread.start()
    result = CliRunner().invoke(app, ["serve", str(saved / "red"), "--port", str(port)])
    thread.join()
    assert result.exit_code == 0 and "Traceback" not in result.output
    assert told[False].status_code == 503 and told[False].json()["error"]["code"] == "shutting_down"
    *_, error, done = filter(None, told[True].text.split("\n"))
    assert "shutting_down" in error and done == "data: [DONE]"


@pytest.mark.parametrize(
    ("key", "says"), [([], "anyone who reaches it can ask"), (["--api-key", "k"], "others reach it")]
)
def test_another_host_is_warned_about(saved, monkeypatch, key, says):  # noqa: F811
    monkeypatch.setattr(serving, "_run", lambda server, listener: None)
    result = CliRunner().invoke(app, ["serve", str(saved / "red"), "--host", "0.0.0.0", "--port", "0", *key])
    assert result.exit_code == 0 and f"warning: 0.0.0.0 is no loopback address: {says}" in " ".join(
        result.stderr.split()
    )


def test_mistakes(saved, monkeypatch):  # noqa: F811
    def call(*words):
        result = CliRunner().invoke(app, ["serve", str(saved / "red"), *map(str, words)])
        assert result.exit_code == 2
        return " ".join(result.output.split())

    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot be listened at" in call("--port", taken.getsockname()[1])
    assert "cannot be listened at" in call("--host", "no such host")
    assert "api_key: is empty" in call("--api-key", "")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mixora.endpoint.application")
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    assert "is not installed; install it with: pip install 'mixora[serve]'" in call()


def test_the_key_comes_from_the_environment_too(saved, monkeypatch):  # noqa: F811
    keys = []
    monkeypatch.setattr("mixora.endpoint.application.Server.__init__", lambda self, *given: keys.append(given[2]))
    monkeypatch.setattr("mixora.endpoint.application.Server.build", lambda self: None)
    monkeypatch.setattr("mixora.answering.roster.load_roster", lambda *given: type("R", (), {"voices": {}}))
    monkeypatch.setattr(serving, "_run", lambda server, listener: None)
    environment = {"MIXORA_API_KEY": "from outside"}
    result = CliRunner().invoke(app, ["serve", str(saved / "red"), "--port", "0"], env=environment)
    assert result.exit_code == 0 and keys == ["from outside"]
