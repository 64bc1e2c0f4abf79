"""`mixora chat`, read from standard input as from a terminal."""

import os
import signal

import pytest
import torch
from typer.testing import CliRunner

from mixora.answering.conversation import Conversation
from mixora.answering.roster import find_source, load_roster
from mixora.answering.sampling import Sampling
from mixora.bases import load_base
from mixora.cli import app
from mixora.commands import answers
from mixora.errors import DataError
from tests.endpoint.service import make_roster


@pytest.fixture(scope="module")
def roster(saved):
    return load_roster([find_source(str(saved / name)) for name in ("red", "blue")])


@pytest.fixture
def chat(roster, saved, monkeypatch):
    """The command with lines as its input; the model is read once for all tests."""
    monkeypatch.setattr("mixora.answering.roster.load_roster", lambda *given: roster)

    def run(*lines, words=()):
        command = ["chat", str(saved / "red"), str(saved / "blue"), "--max-new-tokens", "8", *words]
        told = b"".join(line if isinstance(line, bytes) else f"{line}\n".encode() for line in lines)
        return CliRunner().invoke(app, command, input=told)

    return run


def expect(roster, voice, messages):
    """What transformers' own loop answers, greedily."""
    roster.activate(roster.voices[voice])
    ids = torch.tensor([roster.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]])
    with torch.no_grad():
        found = roster.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, use_cache=True
        )
    return roster.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


def test_a_conversation_goes_on_with_whom_one_chooses(chat, roster):
    result = chat("lamp", "/adapter blue", "and?", "/reset", "/base", "lamp", "/quit", "never read")
    assert result.exit_code == 0, result.output
    red = expect(roster, "red", [user("lamp")])
    blue = expect(roster, "blue", [user("lamp"), {"role": "assistant", "content": red}, user("and?")])
    base = expect(roster, "tiny", [user("lamp")])
    said = ["red: " + red, "blue answers", "blue: " + blue, "forgotten", "tiny answers", "tiny: " + base, ""]
    assert result.stdout == "\n".join(said)


def test_the_end_of_input_leaves_and_commands_are_told(chat):
    result = chat("/help", "/adapter", "/adapter rde", "/nothing", "")
    assert result.exit_code == 0
    assert "/reset" in result.stdout and "* red (adapter)\n  blue (adapter)" in result.stdout
    assert "  tiny (the base)" in result.stdout
    for message in ("which is not served; did you mean 'red'", "/nothing: no such command; valid: /adapter"):
        assert message in " ".join(result.stderr.split())


def test_bytes_that_are_no_text_end_nothing(chat, roster):
    result = chat(b"caf\xe9\n", "lamp")
    assert result.exit_code == 0, result.output
    assert result.stdout == "red: " + expect(roster, "red", [user("lamp")]) + "\n"
    assert "the line is no text in utf-8, so nobody was asked" in " ".join(result.stderr.split())


def test_control_characters_of_an_answer_do_not_reach_the_terminal(chat, monkeypatch):
    monkeypatch.setattr(Conversation, "ask", lambda self, text: (piece for piece in ["\x1b[2J", "a\tb\nc\r", text]))
    result = chat("//slash")
    sign = "\N{REPLACEMENT CHARACTER}"
    assert result.stdout == f"red: {sign}[2Ja\tb\nc{sign}/slash\n"


def test_ctrl_c_stops_an_answer_and_what_was_said_stays(chat, monkeypatch):
    seen = []

    def answer(self, ids):
        seen.append(list(self.messages))
        yield "so "
        os.kill(os.getpid(), signal.SIGINT)
        yield "far"
        yield " and no further"

    monkeypatch.setattr(Conversation, "_answer", answer)
    former = signal.getsignal(signal.SIGINT)
    result = chat("one", "two")
    assert result.stdout == "red: so far (stopped)\n" * 2
    assert seen[1] == [user("one"), {"role": "assistant", "content": "so far"}]
    assert signal.getsignal(signal.SIGINT) is former


def test_draws_follow_the_seed(chat):
    words = ("--temperature", "1.5", "--top-p", "0.9", "--seed")
    first = [chat("lamp", words=(*words, "1")).stdout for _ in range(2)]
    assert first[0] == first[1] != chat("lamp", words=(*words, "2")).stdout


def test_mistakes(chat, roster):
    for words, message in ((["--seed", "1"], "seed: has no effect"), (["--top-p", "0.5"], "top_p: has no effect")):
        result = chat("lamp", words=words)
        assert result.exit_code == 2 and message in " ".join(result.output.split())
    result = chat("x" * 250, "/reset")
    assert result.exit_code == 0 and "valid: /reset, or a smaller --max-new-tokens" in " ".join(result.stderr.split())
    talk = Conversation(roster, roster.voices["red"], Sampling(250))
    with pytest.raises(DataError, match=r"tokens, and the model takes 256 with the 250 of an answer"):
        list(talk.ask("a long question"))
    assert talk.messages == []


def test_in_a_terminal_lines_are_asked_for(roster, monkeypatch, capsys):
    typed, shown = iter(["one", KeyboardInterrupt, "two", EOFError]), []

    def read(prompt):
        shown.append(prompt)
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    talk = Conversation(roster, roster.voices["blue"], Sampling(4))
    assert list(answers._read_lines(talk)) == ["one", "two"] and shown == ["to blue> "] * 4


def test_a_base_that_is_read_answers_too(saved):
    """The whole way from folders, without the fixture's short cut."""
    command = ["chat", str(saved / "red"), "--model", str(saved / "tiny"), "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, command, input="lamp\n")
    assert result.exit_code == 0 and result.stdout.startswith("red: ")
    assert load_base(saved / "tiny")[1].chat_template


def test_a_token_that_only_the_tokenizer_knows_leaves_the_conversation_as_it_was():
    roster = make_roster()
    roster.tokenizer.add_tokens("<new>")
    talk = Conversation(roster, roster.voices["red"], Sampling(4))
    with pytest.raises(DataError, match="the model knows no token 100"):
        list(talk.ask("a<new>"))
    assert not talk.messages and list(talk.ask("lamp"))
