"""What OpenAI's own client gets from the server, against transformers' generation on the same model."""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch

from tests.endpoint.service import LENGTH

MESSAGES = [{"role": "user", "content": "lamp hall"}]
PROMPTS = ["a", "the lamp in the hall", "song", "x" * 30, "attic", "folk and soul", "7", "jazz 12"]


def generate(roster, voice, ids, count):
    """What transformers' own loop gives, greedily."""
    roster.activate(roster.voices[voice])
    prompt = torch.tensor([ids])
    settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    with torch.no_grad():
        found = roster.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)
    return found[0, len(ids) :].tolist()


def expect(roster, voice, ids, count):
    return roster.tokenizer.decode(generate(roster, voice, ids, count), skip_special_tokens=True)


def chat_ids(roster, messages=MESSAGES):
    return roster.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


@pytest.mark.parametrize("voice", ["red", "blue", "tiny"])
def test_chat_and_completion_give_what_the_adapter_generates(client, roster, voice):
    chat = client.chat.completions.create(model=voice, messages=MESSAGES, temperature=0, max_tokens=12)
    assert chat.choices[0].message.content == expect(roster, voice, chat_ids(roster), 12)
    assert (chat.model, chat.object, chat.choices[0].message.role) == (voice, "chat.completion", "assistant")
    ids = roster.tokenizer("lamp").input_ids
    text = client.completions.create(model=voice, prompt="lamp", temperature=0, max_tokens=12)
    assert text.choices[0].text == expect(roster, voice, ids, 12)
    assert text.usage.prompt_tokens == len(ids) and text.choices[0].finish_reason == "length"
    same = client.completions.create(model=voice, prompt=ids, temperature=0, max_tokens=12)
    assert same.choices[0].text == text.choices[0].text


def test_adapters_answer_differently(client):
    said = [
        client.completions.create(model=voice, prompt="lamp", temperature=0, max_tokens=16).choices[0].text
        for voice in ("red", "blue", "tiny")
    ]
    assert len(set(said)) == 3


def test_a_stream_is_the_answer_in_pieces(client):
    asked = {"model": "red", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    told = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert told == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage and len({chunk.id for chunk in chunks}) == 1
    texts = client.completions.create(model="red", prompt="lamp", temperature=0, max_tokens=12, stream=True)
    same = client.completions.create(model="red", prompt="lamp", temperature=0, max_tokens=12)
    assert "".join(chunk.choices[0].text for chunk in texts) == same.choices[0].text


def test_a_stop_text_ends_the_answer_before_it(client):
    asked = {"model": "red", "prompt": "lamp", "temperature": 0, "max_tokens": 20}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[7:9]
    for stops in (stop, ["never there", stop]):
        cut = client.completions.create(**asked, stop=stops).choices[0]
        assert (cut.text, cut.finish_reason) == (whole[: whole.index(stop)], "stop")
    pieces = client.completions.create(**asked, stop=stop, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole[: whole.index(stop)]


def test_the_end_token_ends_the_answer(client, roster, monkeypatch):
    asked = {"model": "red", "prompt": "lamp", "temperature": 0, "max_tokens": 20}
    ids = generate(roster, "red", roster.tokenizer("lamp").input_ids, 20)
    end = next(n for n, token in enumerate(ids) if n > 3 and token not in ids[:n])
    monkeypatch.setattr(roster, "ends", frozenset({ids[end]}))
    found = client.completions.create(**asked)
    assert found.choices[0].text == roster.tokenizer.decode(ids[:end], skip_special_tokens=True)
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("stop", end + 1)


def test_a_seed_gives_the_same_answer_again(client):
    def ask(seed):
        asked = {"model": "red", "messages": MESSAGES, "temperature": 1.5, "top_p": 0.9, "max_tokens": 20}
        return client.chat.completions.create(**asked, seed=seed).choices[0].message.content

    assert ask(1) == ask(1) != ask(2)


def test_log_probabilities_are_the_models(client, roster):
    ids = roster.tokenizer("lamp").input_ids
    found = client.completions.create(model="red", prompt="lamp", temperature=0, max_tokens=5, logprobs=3)
    told = found.choices[0].logprobs
    roster.activate(roster.voices["red"])
    new = roster.tokenizer(found.choices[0].text, add_special_tokens=False).input_ids
    with torch.no_grad():
        logits_LV = roster.model(input_ids=torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].double()
    want_L = logits_LV.log_softmax(dim=-1).gather(1, torch.tensor(new).unsqueeze(1)).squeeze(1)
    assert told.token_logprobs == pytest.approx(want_L.tolist(), abs=1e-5)
    assert "".join(told.tokens) == found.choices[0].text and told.text_offset == [0, 1, 2, 3, 4]
    assert [max(tops.values()) for tops in told.top_logprobs] == pytest.approx(told.token_logprobs)
    assert {len(tops) for tops in told.top_logprobs} == {3}


def test_log_probabilities_of_a_chat(client):
    asked = {"model": "red", "messages": MESSAGES, "temperature": 0, "max_tokens": 4, "logprobs": True}
    whole = client.chat.completions.create(**asked, top_logprobs=2).choices[0].logprobs.content
    assert len(whole) == 4
    for entry in whole:
        assert entry.top_logprobs[0].token == entry.token and bytes(entry.bytes).decode() == entry.token
        assert entry.logprob <= 0 and sum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1 + 1e-9
    chunks = client.chat.completions.create(**asked, top_logprobs=2, stream=True)
    told = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert told == whole
    assert client.chat.completions.create(**asked).choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("temperature", [0, 1.2])
def test_an_answer_does_not_depend_on_its_batch_mates(service, client, temperature):
    """Eight requests at once for two adapters and the base, in four slots, against each of them alone."""

    def ask(number):
        asked = {"prompt": PROMPTS[number], "max_tokens": 6 + 5 * number, "temperature": temperature}
        voice = ("red", "red", "blue", "red", "tiny", "red", "blue", "red")[number]
        return client.completions.create(**asked, model=voice, seed=number).choices[0].text

    alone = [ask(number) for number in range(8)]
    together, begin = [None] * 8, threading.Barrier(8)

    def ask_at_once(number):
        begin.wait()
        together[number] = ask(number)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask_at_once, range(8)))
    assert together == alone
    service.wait_for(running=0, waiting=0)


def test_models_health_and_paths(service, client):
    assert [model.id for model in client.models.list()] == ["tiny", "red", "blue"]
    assert client.models.retrieve("red").model_dump()["parent"] == "tiny"
    assert client.models.retrieve("red").model_dump()["max_model_len"] == LENGTH
    assert httpx.get(f"{service.url}/health").json() == {"status": "ok"}
    for asked, status in (("/v2/nothing", 404), ("/v1/completions", 405)):
        found = httpx.get(service.url + asked)
        assert found.status_code == status and found.json()["error"]["type"] == "invalid_request_error"


def test_a_model_that_is_not_served(client):
    with pytest.raises(openai.NotFoundError, match="model: got 'green'; valid: tiny, red, blue") as found:
        client.completions.create(model="green", prompt="a")
    assert (found.value.code, found.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="got 'green'"):
        client.models.retrieve("green")


def test_metrics_count(service, client):
    def read():
        names = ('tokens_total{kind="answer",model="blue"}', 'tokens_total{kind="prompt",model="blue"}')
        path = 'requests_total{path="/v1/completions",status="200"}'
        return [service.metric(f"mixora_{name}") or 0 for name in (*names, path, "request_seconds_count")]

    before = read()
    client.completions.create(model="blue", prompt="lamp", temperature=0, max_tokens=7)
    # four letters behind the token that opens a text
    assert [after - earlier for after, earlier in zip(read(), before, strict=True)] == [7, 5, 1, 1]
    assert (service.metric("mixora_slots"), service.metric("mixora_running")) == (4, 0)
