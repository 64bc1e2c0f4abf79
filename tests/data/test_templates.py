"""The process that renders chat templates, from both sides: what it answers, and what is told when it does not."""

import io
import json
import sys
from types import SimpleNamespace

import pytest
from jinja2 import TemplateError

from mixora.data import renderer, templates
from mixora.errors import DataError

ASKED = {"template": "{% for m in messages %}{{ m.content }};{% endfor %}", "asks": False, "tokens": {}}


def serve(monkeypatch, *lines):
    """The answers of the script to lines of JSON, and the limits that it set itself."""
    limits = []
    monkeypatch.setattr("resource.setrlimit", lambda *given: limits.append(given))
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in lines)))
    monkeypatch.setattr(sys, "stdout", told := io.StringIO())
    renderer.main()
    return [json.loads(line) for line in told.getvalue().splitlines()], limits


def test_it_says_that_it_is_ready_and_answers_each_line(monkeypatch):
    path = [*sys.path]
    talk = [{"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}]
    good, bad = {**ASKED, "messages": talk}, {**ASKED, "messages": talk, "template": "{{ 1 // 0 }}"}
    told, limits = serve(monkeypatch, path, good, bad, good)
    assert told == [{}, {"text": "hi;ho;"}, {"error": "ZeroDivisionError: integer division or modulo by zero"}, told[1]]
    assert [most for _, most in limits] == [(renderer.MOST_MEMORY, renderer.MOST_MEMORY)]
    assert sys.path == path


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "it needs more than 1024 MiB"),
        (TemplateError("no such role"), "no such role"),
        (TypeError("x" * 999), "TypeError: " + "x" * 489),
    ],
)
def test_an_error_of_a_template_is_an_answer(error, told):
    def render(*_, **__):
        raise error

    assert renderer._render(render, {**ASKED, "messages": []}) == {"error": told}


def test_a_system_without_limits_renders_without(monkeypatch):
    def refuse(*_):
        raise ValueError("not here")

    monkeypatch.setattr("resource.setrlimit", refuse)
    renderer._limit_memory()


def test_an_answer_that_finds_no_memory_says_so(monkeypatch, capsys):
    def fail(found, own=json.dumps):
        if "text" in found:
            raise MemoryError
        return own(found)

    monkeypatch.setattr(renderer.json, "dumps", fail)
    renderer._answer({"text": "long"})
    assert json.loads(capsys.readouterr().out) == {"error": "it needs more than 1024 MiB"}


@pytest.fixture
def none_running(monkeypatch):
    """What is started here is ended here."""
    monkeypatch.setattr(templates, "_RUNNING", [])
    yield
    templates._close()


def start(monkeypatch, tmp_path, script):
    """A process whose script is another one."""
    file = tmp_path / "templates.py"
    (tmp_path / "renderer.py").write_text(script)
    monkeypatch.setattr(templates, "__file__", str(file))
    return templates._serving()


READY = "import sys\nprint('{}', flush=True)\n"


@pytest.mark.parametrize("script", ["", "raise ImportError", "import sys; sys.stdin.close()"])
def test_a_process_that_does_not_start_is_told(script, none_running, monkeypatch, tmp_path):
    with pytest.raises(RuntimeError, match="did not start: it ends the process that renders it"):
        start(monkeypatch, tmp_path, script)


def test_a_process_that_ends_or_writes_too_much_is_told_and_replaced(none_running, monkeypatch, tmp_path):
    asked = READY + "sys.stdin.readline(); sys.stdin.readline(); "
    running = start(monkeypatch, tmp_path, asked + "sys.exit()")
    assert templates._serving() is running
    assert running.ask("{}") == {"error": "it ends the process that renders it, most likely for its memory"}
    assert not running.is_alive
    monkeypatch.setattr(templates, "MOST_ANSWER", 2**20)
    other = start(monkeypatch, tmp_path, asked + "print('x' * 2**21, flush=True)")
    assert other is not running
    assert other.ask("{}") == {"error": "it writes more than 1 MiB"}


def test_no_process_outlives_ours(none_running, monkeypatch, tmp_path):
    running = start(monkeypatch, tmp_path, READY + "import time; time.sleep(60)")
    templates._close()
    assert not running.is_alive and templates._RUNNING == []
    # a fork of ours ends what it did not start as little as it uses it
    other = start(monkeypatch, tmp_path, READY + "import time; time.sleep(60)")
    monkeypatch.setattr(other, "owner", -1)
    templates._close()
    assert other._process.poll() is None
    other.close()


def test_a_tokenizer_with_a_way_of_its_own_is_asked_itself():
    own = SimpleNamespace(seen=[])
    tokenizer = type(
        "Own", (), {"apply_chat_template": lambda self, talk, **how: own.seen.append((talk, how)) or "its"}
    )
    assert templates.render([{"role": "user", "content": "hi"}], tokenizer(), True) == "its"
    assert own.seen == [([{"role": "user", "content": "hi"}], {"tokenize": False, "add_generation_prompt": True})]


def test_a_tokenizer_without_a_template_is_a_mistake(plain_tokenizer):
    with pytest.raises(DataError, match="has no chat template for conversations"):
        templates.render([{"role": "user", "content": "hi"}], plain_tokenizer, False)
