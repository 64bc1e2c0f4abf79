"""Whatever is posted, the answer is one: 200, or an error in OpenAI's form that names what was wrong."""

import asyncio
import json

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixora.endpoint.application import Server
from mixora.endpoint.limits import Limits
from tests.endpoint.service import make_roster

CHAT = {"model": "red", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
TEXT = {"model": "red", "prompt": "a", "max_tokens": 1}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT}
NAMES = [*CHAT, "prompt", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "n", "logprobs"]
NAMES += ["top_logprobs", "user", "tools", "logit_bias", "echo", "best_of", "max_completion_tokens", "response_format"]
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner))
numbers = st.sampled_from([0, 1, 2, -1, 0.5, 1e300, 2**63, "1", True, [0], [[5]], ["a"], {"include_usage": True}])


class Asker:
    """Asks the application without a socket; its engine runs."""

    def __init__(self):
        self.loop = asyncio.new_event_loop()
        self.server = Server(make_roster(), Limits(slots=4, length=40, answer_tokens=2))
        application = self.server.build()
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        self.server.engine.start()

    def post(self, path, body):
        headers = {"content-type": "application/json"}
        return self.loop.run_until_complete(self.client.post(path, content=body, headers=headers))

    def close(self):
        self.loop.run_until_complete(self.client.aclose())
        self.server.engine.stop()
        self.loop.close()


@pytest.fixture(scope="module")
def asker():
    asker = Asker()
    yield asker
    asker.close()


def check(response):
    if response.status_code == 200:
        return
    assert response.status_code in (400, 404), response.text
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert 0 < len(error["message"]) < 10_000 and "Traceback" not in error["message"]


@given(st.sampled_from(list(PATHS)), st.dictionaries(st.sampled_from(NAMES), values | numbers, min_size=1, max_size=4))
@settings(max_examples=150)
def test_requests_with_wrong_values(asker, path, changes):
    check(asker.post(path, json.dumps({**PATHS[path], **changes})))


@given(st.binary(max_size=60) | values.map(json.dumps).map(str.encode))
@settings(max_examples=80)
def test_bodies_that_nobody_meant_are_refused(asker, body):
    """Most are no requests (400); one that happens to be a request names no model that is served (404)."""
    response = asker.post("/v1/completions", body)
    check(response)
    assert response.status_code != 200


@pytest.mark.parametrize(
    ("path", "changes", "says", "param"),
    [
        ("/v1/completions", {"n": 2}, "n: got 2; valid: 1", "n"),
        ("/v1/completions", {"temperature": 3}, "temperature: got 3; valid: less than or equal to 2", "temperature"),
        ("/v1/completions", {"temprature": 1}, "temprature: unknown key; did you mean 'temperature'?", "temprature"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "prompt: got 2 prompts; valid: one", "prompt"),
        ("/v1/completions", {"prompt": [99999]}, "token ids are 0 to", "prompt"),
        ("/v1/completions", {"prompt": []}, "one or more", "prompt"),
        ("/v1/completions", {"echo": True}, "echo: got True", "echo"),
        ("/v1/completions", {"suffix": "a"}, "suffix: is not served; valid: left out", "suffix"),
        ("/v1/completions", {"logprobs": 6}, "logprobs: got 6", "logprobs"),
        ("/v1/completions", {"stop": ["a"] * 9}, "or at most 8 items", "stop"),
        ("/v1/completions", {"stop": ""}, "stop: got ''", "stop"),
        ("/v1/completions", {"stream_options": {}}, "has no effect without stream", "stream_options"),
        ("/v1/completions", {"model": 5}, "model: got 5; valid: a valid string", "model"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "has no effect without logprobs", "top_logprobs"),
        ("/v1/chat/completions", {"tools": [{"type": "function"}]}, "tools: is not served", "tools"),
        ("/v1/chat/completions", {"messages": []}, "messages: got []; valid: at least 1 item", "messages"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role: got 'tool'",
            "messages",
        ),
        ("/v1/chat/completions", {"max_completion_tokens": 3}, "valid: one of them", "max_completion_tokens"),
        ("/v1/chat/completions", {"store": True}, "store: got True; valid: False", "store"),
        ("/v1/chat/completions", {"tool_choice": "required"}, "valid: 'none' or 'auto'", "tool_choice"),
    ],
)
def test_a_mistake_is_named(asker, path, changes, says, param):
    response = asker.post(path, json.dumps({**PATHS[path], **changes}))
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error["message"] and error["param"] == param
    # of a list whose parts are wrong nothing is told but that
    assert error["message"].count("\n") == 0 and "validation" not in error["message"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("{", "the body is not JSON"),
        ("[]", "the body: got list; valid: an object"),
        ('{"model": "red", "model": "blue"}', "the body has the key 'model' twice"),
        ('{"temperature": NaN}', "NaN is no number"),
        ('{"prompt": "\\ud800"}', "half of a surrogate pair"),
        ("[" * 5000, "nested too deeply"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_a_body_that_cannot_be_read_is_one_message(asker, body, says):
    response = asker.post("/v1/completions", body)
    assert response.status_code == 400 and says in response.json()["error"]["message"]


def test_a_template_that_refuses_is_a_mistake_of_the_messages(asker, monkeypatch):
    monkeypatch.setattr(asker.server.roster.tokenizer, "chat_template", "{{ raise_exception('roles must alternate') }}")
    response = asker.post("/v1/chat/completions", json.dumps(CHAT))
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "the chat template refuses the messages: roles must alternate"


def test_what_clients_send_and_means_nothing_is_taken(asker):
    idle = {
        "n": 1,
        "user": "me",
        "metadata": {"run": "7"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "stop": None,
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    of_chats = {"store": False, "tools": [], "tool_choice": "none", "parallel_tool_calls": True, "messages": messages}
    assert asker.post("/v1/chat/completions", json.dumps({**CHAT, **idle, **of_chats})).status_code == 200
    assert asker.post("/v1/completions", json.dumps({**TEXT, **idle, "prompt": ["a"]})).status_code == 200
