"""What a shell would start: each program's own parser reads its words, and nothing is started."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from tests.documentation import mixora_command
from tests.documentation.blocks import ROOT
from tests.documentation.table import PROGRAMS_OF_OTHERS

MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# what the shell does itself, or prints
OF_THE_SHELL = ("cd", "printf", "source")


def split_commands(text):
    """The words of each command; pipes and lists are several commands, comments and redirections none."""
    waiting = ""
    for line in text.splitlines():
        waiting = f"{waiting}\n{line}" if waiting else line
        if waiting.endswith("\\"):
            waiting = waiting[:-1]
            continue
        try:
            shlex.split(waiting, comments=True)
        except ValueError:
            # a quotation goes on in the next line
            continue
        yield from _split_line(waiting)
        waiting = ""
    assert not waiting, f"nothing closes the quotation: {waiting}"


def _split_line(line):
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|&;"):
            yield words
            words = []
        elif set(word) <= set("<>"):
            # a file follows
            next(lexer)
        else:
            words.append(word)
    if words:
        yield words


def check(words, monkeypatch):
    """Raises what the program's parser raises, or `AssertionError`, for words that it would refuse."""
    while re.match(r"\w+=", words[0]):
        _set_variable(*words[0].split("=", 1), monkeypatch)
        words = words[1:]
    program = Path(words[0]).name
    if program not in (*OF_THE_SHELL, *PROGRAMS_OF_OTHERS):
        assert program in CHECKS, f"{program}: nothing here knows this program"
        CHECKS[program](words[1:], monkeypatch)


def _set_variable(name, value, monkeypatch):
    if name.startswith("MIXORA_"):
        sources = (path.read_text(encoding="utf-8") for path in ROOT.glob("src/mixora/**/*.py"))
        assert any(re.search(rf"\b{name}\b", source) for source in sources), name
    if name == "PYTHONPATH":
        monkeypatch.syspath_prepend(value)
    monkeypatch.setenv(name, value)


def _check_make(words, monkeypatch):
    for word in words:
        name, equals, _ = word.partition("=")
        known = f"$({name})" in MAKEFILE if equals else re.search(f"^{re.escape(name)}:", MAKEFILE, re.MULTILINE)
        assert known, f"make {word}: no such target or variable"


def _check_python(words, monkeypatch):
    if words[0] == "-c":
        ast.parse(words[1])
    elif words[0] == "-m":
        _check_module(words[1], words[2:], monkeypatch)
    else:
        is_there = (ROOT / words[0]).is_file() or Path(words[0]).name in PROGRAMS_OF_OTHERS
        assert is_there, f"python {words[0]}: no such file"


def _check_module(module, words, monkeypatch):
    if module in CHECKS:
        CHECKS[module](words, monkeypatch)
        return
    found = importlib.util.find_spec(module)
    assert found is not None, f"python -m {module}: no such module"
    if module == "pytest":
        assert all((ROOT / word).exists() for word in words if not word.startswith("-")), words
    else:
        # a program of the repository: it names its options and their words in its own files
        own = [path.read_text(encoding="utf-8") for path in Path(found.origin).parent.glob("*.py")]
        for word in words:
            assert not word.startswith("--") or any(f'"{word}"' in text for text in own), f"{module}: {word}"


def _check_pip(words, monkeypatch):
    assert words[0] == "install"
    for word in words[1:]:
        if not word.startswith("-"):
            asked = Requirement(word)
            assert asked.name != "mixora" or asked.extras <= set(PROJECT["optional-dependencies"]), word


def _check_curl(words, monkeypatch):
    (address,) = (word for word in words if word.startswith("http"))
    routes = (ROOT / "src/mixora/endpoint/application.py").read_text(encoding="utf-8")
    assert f'"{urlsplit(address).path}"' in routes, address
    if "-d" in words:
        json.loads(words[words.index("-d") + 1])


def _check_torchrun(words, monkeypatch):
    from torch.distributed.run import get_args_parser

    _check_launched(get_args_parser().parse_args(words), monkeypatch)


def _check_accelerate(words, monkeypatch):
    from accelerate.commands.launch import launch_command_parser

    assert words[0] == "launch"
    _check_launched(launch_command_parser().parse_args(words[1:]), monkeypatch)


def _check_launched(options, monkeypatch):
    if options.module:
        _check_module(options.training_script, options.training_script_args, monkeypatch)


CHECKS = {
    "mixora": mixora_command.check,
    "make": _check_make,
    "python": _check_python,
    "pip": _check_pip,
    "curl": _check_curl,
    "torchrun": _check_torchrun,
    "accelerate": _check_accelerate,
}
