"""What fails on the server's side ends the answers that it was computed for; others go on, and so does the server."""

import json
import threading

import openai
import pytest
import torch

from mixora.answering.answer import Answer
from mixora.answering.rows import CachedRows
from tests.endpoint.service import gate, make_roster, running

ASKED = {"prompt": "lamp", "temperature": 0, "max_tokens": 8}


def no_memory(*given):
    raise torch.OutOfMemoryError("no memory is left")


def ask(service, voice="red", **changes):
    return service.post("/v1/completions", json.dumps({**ASKED, "model": voice, **changes}))


def ask_in_turn(service, opened, *asked):
    """Each of these once those before it are there, and the statuses of all; the first ones are held up until then."""
    found = [None] * len(asked)

    def ask_one(place):
        found[place] = ask(service, **asked[place]).status_code

    threads = []
    for place in range(len(asked)):
        threads.append(threading.Thread(target=ask_one, args=(place,)))
        threads[-1].start()
        service.wait_for(running=1, waiting=place)
    opened.set()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    ("name", "lengths", "statuses"),
    [("join", (8, 8, 8), [500, 500, 200]), ("keep", (8, 2, 8), [500, 200, 200])],
    ids=["a row that comes in", "a row that leaves"],
)
def test_rows_for_which_memory_does_not_suffice_fail_alone(roster, monkeypatch, name, lengths, statuses):
    with running(roster, slots=4) as service:
        want = ask(service).json()["choices"]
        voices = ("red", "red", "blue")
        asked = [{"voice": v, "max_tokens": count} for v, count in zip(voices, lengths, strict=True)]
        with monkeypatch.context() as patch, gate(monkeypatch, roster) as opened:
            patch.setattr(CachedRows, name, no_memory)
            assert ask_in_turn(service, opened, *asked) == statuses
        service.wait_for(running=0, waiting=0)
        assert ask(service).json()["choices"] == want


def test_prompts_that_cannot_be_read_together_are_read_alone(roster, monkeypatch):
    begin = roster.decoder.begin

    def begin_short(prompts):
        if len(prompts) * max(map(len, prompts)) > 40:
            no_memory()
        return begin(prompts)

    with running(roster, slots=4) as service:
        want = ask(service, prompt="jazz").json()["choices"][0]["text"]
        with monkeypatch.context() as patch, gate(monkeypatch, roster) as opened:
            patch.setattr(roster.decoder, "begin", begin_short)
            prompts = ("lamp", "jazz", "a" * 30, "a" * 50)
            assert ask_in_turn(service, opened, *({"prompt": prompt} for prompt in prompts)) == [200, 200, 200, 500]
        assert ask(service, prompt="jazz").json()["choices"][0]["text"] == want


def test_a_pass_that_breaks_off_leaves_the_model_as_it_was(roster, monkeypatch):
    layers = roster.model.get_base_model().model.layers
    with running(roster, slots=2) as service:
        want = ask(service).json()["choices"]
        with monkeypatch.context() as patch:
            patch.setattr(layers[-1].mlp, "forward", no_memory)
            assert ask(service).status_code == 500
        assert ask(service).json()["choices"] == want


def test_an_adapter_that_cannot_be_switched_to_fails_its_own_answers(roster, monkeypatch):
    tuner = roster.model.base_model
    switch = tuner.set_adapter

    def switch_and_break(*given, **named):
        switch(*given, **named)
        no_memory()

    with running(roster, slots=2) as service:
        want = ask(service).json()["choices"]
        with monkeypatch.context() as patch:
            patch.setattr(tuner, "set_adapter", switch_and_break)
            assert ask(service, "blue").status_code == 500
        assert ask(service).json()["choices"] == want


class Panic(BaseException):
    """As tokenizers raise it where a bug of theirs is met."""


@pytest.mark.parametrize("error", [ValueError, Panic])
@pytest.mark.parametrize("place", ["an answer", "the queue"])
def test_the_engine_outlives_what_nobody_thought_of(roster, monkeypatch, caplog, error, place):
    def fail(*given):
        raise error("of all things")

    with running(roster, slots=2) as service, service.client() as client:
        with monkeypatch.context() as patch:
            patch.setattr(*((Answer, "add") if place == "an answer" else (service.server.engine, "_admit")), fail)
            with pytest.raises(openai.InternalServerError, match="failed to compute the answer"):
                client.completions.create(model="red", **ASKED)
        assert "of all things" in caplog.text and service.server.engine.is_alive
        assert client.completions.create(model="red", **ASKED).usage.completion_tokens == 8


def test_tokens_that_the_model_does_not_have_are_refused():
    roster = make_roster()
    roster.tokenizer.add_tokens("<new>")
    with running(roster, slots=2) as service:
        for path, name, said in (
            ("completions", "prompt", "a<new>"),
            ("chat/completions", "messages", [{"role": "user", "content": "a<new>"}]),
        ):
            found = service.post(f"/v1/{path}", json.dumps({"model": "red", "max_tokens": 2, name: said}))
            assert found.status_code == 400 and found.json()["error"]["param"] == name
            assert f"{name}: got token 100; token ids are 0 to 99" in found.json()["error"]["message"]
