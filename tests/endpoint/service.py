"""A server on a thread of this process, over a tiny model with two adapters, and a gate that holds its model up."""

import socket
import threading
import time
from contextlib import contextmanager

import httpx
import openai
import peft
import uvicorn

import mixora
from mixora.answering.roster import Roster
from mixora.endpoint.application import Server
from mixora.endpoint.limits import Limits
from tests.characters import build_tokenizer
from tests.models import fill, tiny_llama

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2}
LENGTH = 256


def make_roster(layers=2):
    """Base `tiny`, adapters `red` (top-2 of four experts) and `blue` (one LoRA)."""
    tokenizer = build_tokenizer(chat=True)
    marks = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": LENGTH}
    base = tiny_llama(layers, vocab_size=len(tokenizer), **marks)
    model = peft.get_peft_model(base, mixora.recipe("mola", **SMALL), adapter_name="red")
    model.add_adapter("blue", mixora.recipe("lora", rank=2))
    adapters = {name: (name, "auto") for name in ("red", "blue")}
    return Roster(fill(model, std=1.0), tokenizer, "tiny", adapters)


class Service:
    def __init__(self, server, port):
        self.server, self.url = server, f"http://127.0.0.1:{port}"

    def client(self, **settings):
        """The real client, which asks once."""
        return openai.OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, **settings})

    def post(self, path, body, **headers):
        settings = {"headers": {"content-type": "application/json", **headers}, "timeout": 60}
        return httpx.post(self.url + path, content=body, **settings)

    def metric(self, name):
        """The value of a line of /metrics."""
        lines = httpx.get(f"{self.url}/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), None)

    def wait_for(self, **counts):
        """Until so many requests are running and waiting."""
        deadline = time.monotonic() + 30
        engine = self.server.engine
        while any(getattr(engine, f"num_{name}") != count for name, count in counts.items()):
            assert time.monotonic() < deadline, (counts, engine.num_running, engine.num_waiting)
            time.sleep(0.005)


@contextmanager
def running(roster, api_key=None, hosts=None, **limits):
    server = Server(roster, Limits(**limits), api_key, hosts)
    listener = socket.create_server(("127.0.0.1", 0))
    web = uvicorn.Server(uvicorn.Config(server.build(), log_config=None, ws="none", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
    thread.start()
    while not web.started:
        assert thread.is_alive()
        time.sleep(0.005)
    try:
        yield Service(server, listener.getsockname()[1])
    finally:
        web.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def gate(monkeypatch, roster):
    """Hold the model up before each token after the first, until the gate is set."""
    opened, advance = threading.Event(), roster.decoder.advance

    def wait_and_advance(rows, tokens):
        assert opened.wait(60)
        return advance(rows, tokens)

    with monkeypatch.context() as patch:
        patch.setattr(roster.decoder, "advance", wait_and_advance)
        try:
            yield opened
        finally:
            opened.set()
