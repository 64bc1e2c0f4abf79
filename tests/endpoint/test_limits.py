"""Full queues, long prompts, late answers, clients that leave: each is told, and costs nobody else anything."""

import json
import socket
import threading
import time

import httpx
import openai
import pytest
import torch

from mixora.answering.prompts import text_ids
from mixora.endpoint import application
from tests.endpoint.service import gate, running

ASKED = {"model": "red", "prompt": "lamp", "temperature": 0}


@pytest.fixture
def hold(monkeypatch, roster):
    with gate(monkeypatch, roster) as opened:
        yield opened


def ask_aside(client, found, **settings):
    def ask():
        found.append(client.completions.create(**{**ASKED, "max_tokens": 3, **settings}).choices[0].text)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def wait_for(is_so):
    deadline = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_beyond_the_queue_a_request_is_told_to_come_again(roster, hold):
    with running(roster, slots=1, queue=1) as service, service.client() as client:
        found = []
        first = ask_aside(client, found)
        service.wait_for(running=1, waiting=0)
        second = ask_aside(client, found)
        service.wait_for(running=1, waiting=1)
        with pytest.raises(openai.RateLimitError, match="1 requests wait already") as refused:
            client.completions.create(**ASKED)
        assert refused.value.response.headers["retry-after"] == "1"
        assert refused.value.body["type"] == "rate_limit_error"
        hold.set()
        for thread in (first, second):
            thread.join()
        assert len(found) == 2 and found[0] == found[1]
        assert service.metric('mixora_requests_total{path="/v1/completions",status="429"}') == 1


def test_without_a_queue_free_slots_are_given_all_the_same(roster):
    with running(roster, slots=1, queue=0) as service, service.client() as client:
        assert client.completions.create(**ASKED, max_tokens=2).usage.completion_tokens == 2


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_frees_its_slot(roster, hold, stream):
    with running(roster, slots=1) as service, service.client() as client:
        body = json.dumps({**ASKED, "max_tokens": 200, "stream": stream})
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
            connection.sendall(f"{head}\r\n\r\n{body}".encode())
            service.wait_for(running=1)
            if stream:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
        # its slot is free after the token at hand, long before its last one
        lane = service.server.engine._lanes["red"]
        (question,) = lane.newcomers + lane.questions
        wait_for(lambda: question.is_abandoned)
        hold.set()
        assert client.completions.create(**ASKED, max_tokens=2).usage.completion_tokens == 2
        service.wait_for(running=0, waiting=0)
        assert service.metric("mixora_vanished_total") == 1
        assert service.metric('mixora_tokens_total{kind="answer",model="red"}') < 10


def test_prompt_and_answer_must_fit(roster):
    with running(roster, slots=1, length=20, answer_tokens=4) as service, service.client() as client:
        for asked in ({"prompt": "a" * 25}, {"prompt": "a" * 10, "max_tokens": 12}):
            with pytest.raises(openai.BadRequestError, match="at most 20 together") as refused:
                client.completions.create(**{**ASKED, **asked})
            assert (refused.value.code, refused.value.param) == ("context_length_exceeded", "max_tokens")
        assert client.completions.create(**{**ASKED, "prompt": "a" * 10}).usage.completion_tokens == 4
        # what is left, where that is less
        assert client.completions.create(**{**ASKED, "prompt": "a" * 17}).usage.completion_tokens == 2


def test_a_late_answer_is_ended(roster, hold):
    with running(roster, slots=1, seconds=0.2) as service, service.client() as client:
        found = []
        asked = ({**ASKED, "max_tokens": 50}, {**ASKED, "max_tokens": 50, "stream": True})

        def ask(body):
            found.append(service.post("/v1/completions", json.dumps(body)))

        threads = [threading.Thread(target=ask, args=(body,)) for body in asked]
        for thread in threads:
            thread.start()
        service.wait_for(running=1, waiting=1)
        time.sleep(0.25)
        hold.set()
        for thread in threads:
            thread.join()
        told = {response.status_code: response for response in found}
        assert told[504].json()["error"]["code"] == "timeout"
        assert told[504].headers["x-should-retry"] == "false"
        assert '"code": "timeout"' in told[200].text and told[200].text.endswith("data: [DONE]\n\n")
        assert client.completions.create(**ASKED, max_tokens=1).usage.completion_tokens == 1


@pytest.fixture
def slow_tokenizer(monkeypatch):
    """Prompts are read once this is set."""
    opened = threading.Event()

    def wait(text, tokenizer):
        assert opened.wait(30)
        return text_ids(text, tokenizer)

    monkeypatch.setattr(application, "text_ids", wait)
    return opened


def test_prompts_that_wait_to_be_read_are_bounded_in_number_and_time(roster, slow_tokenizer):
    with running(roster, slots=1, queue=1, seconds=0.5) as service, service.client() as client:
        found = []
        ask = lambda: found.append(service.post("/v1/completions", json.dumps(ASKED)))  # noqa: E731
        threads = [threading.Thread(target=ask) for _ in range(2)]
        for count, thread in enumerate(threads, start=1):
            thread.start()
            wait_for(lambda count=count: service.server._num_encoding == count)
        with pytest.raises(openai.RateLimitError, match="2 requests wait already"):
            client.completions.create(**ASKED)
        # the second one never came to be read
        wait_for(lambda: found)
        assert found[0].status_code == 504 and found[0].json()["error"]["code"] == "timeout"
        slow_tokenizer.set()
        for thread in threads:
            thread.join()
        assert service.server._num_encoding == 0
        assert client.completions.create(**ASKED, max_tokens=1).usage.completion_tokens == 1


def no_numbers(rows, tokens):
    return torch.full((len(tokens), 100), torch.nan)


@pytest.mark.parametrize(
    ("step", "fails"),
    [("advance", lambda rows, tokens: 1 / 0), ("begin", lambda prompts: 1 / 0), ("advance", no_numbers)],
    ids=["a token", "a prompt", "NaN"],
)
def test_a_model_that_fails_fails_its_own_answers_only(roster, monkeypatch, step, fails):
    with running(roster, slots=2) as service, service.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(roster.decoder, step, fails)
            with pytest.raises(openai.InternalServerError, match="failed to compute the answer") as refused:
                client.completions.create(**ASKED, max_tokens=5)
            assert "division" not in str(refused.value)
        assert client.completions.create(**ASKED, max_tokens=5).usage.completion_tokens == 5


def test_a_key_is_asked_for(roster):
    with running(roster, api_key="sécret") as service:
        with service.client(api_key="wrong") as client, pytest.raises(openai.AuthenticationError, match="API key"):
            client.models.list()
        for path in ("/metrics", "/v1/models"):
            assert httpx.get(service.url + path).status_code == 401
            given = {"Authorization": "Bearer sécret".encode()}
            assert httpx.get(service.url + path, headers=given).status_code == 200
        assert httpx.get(f"{service.url}/health").status_code == 200


def test_web_pages_of_others_are_kept_out(roster):
    with running(roster, hosts=("127.0.0.1", "localhost", "::1")) as service:
        for host, status in (("127.0.0.1:80", 200), ("[::1]:8000", 200), ("localhost", 200), ("evil.example:80", 400)):
            assert httpx.get(f"{service.url}/v1/models", headers={"host": host}).status_code == status
        found = service.post("/v1/completions", json.dumps(ASKED), **{"content-type": "text/plain"})
        assert found.status_code == 415 and found.json()["error"]["code"] == "content_type"


def test_bodies_have_an_end(roster):
    with running(roster, body_bytes=200, body_seconds=0.2) as service:
        large = json.dumps({**ASKED, "prompt": "a" * 300})
        assert service.post("/v1/completions", large).status_code == 413

        def chunks():
            for begin in range(0, len(large), 50):
                yield large[begin : begin + 50].encode()

        assert service.post("/v1/completions", chunks()).status_code == 413

        def slow_chunks():
            yield b"{"
            time.sleep(0.4)
            yield b"}"

        assert service.post("/v1/completions", slow_chunks()).status_code == 408


def test_the_server_ends_with_answers_on_their_way(roster, hold):
    with running(roster, slots=1) as service:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(service.post("/v1/completions", json.dumps({**ASKED, "max_tokens": 200})))
        )
        thread.start()
        service.wait_for(running=1)
        engine = service.server.engine
        ending = threading.Thread(target=engine.stop)
        ending.start()
        hold.set()
        ending.join()
        thread.join()
        assert found[0].status_code == 503 and found[0].json()["error"]["code"] == "shutting_down"
        assert httpx.get(f"{service.url}/health").status_code == 503
        assert service.post("/v1/completions", json.dumps(ASKED)).status_code == 503


def test_a_request_that_waits_can_be_given_up(roster, hold):
    with running(roster, slots=1, queue=1) as service, service.client() as client:
        found = []
        first = ask_aside(client, found)
        service.wait_for(running=1, waiting=0)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{service.url}/v1/completions", json=ASKED, timeout=0.2)
        (given_up,) = service.server.engine._waiting
        wait_for(lambda: given_up.is_abandoned)
        hold.set()
        first.join()
        service.wait_for(running=0, waiting=0)
        # of the one that was given up, no token was made
        assert len(found) == 1 and service.metric('mixora_tokens_total{kind="answer",model="red"}') == 3
