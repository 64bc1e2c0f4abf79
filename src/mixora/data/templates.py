"""Chat templates, which are programs of whoever made the tokenizer: rendered in a process of their own, with bounds.

transformers keeps templates from reading files and from running Python, but not from going on for ever or from filling
the memory. The process is started for the first conversation and serves all that follow.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mixora.errors import DataError

MOST_SECONDS = 10.0
MOST_ANSWER = 2**26
START_SECONDS = 120.0


def render(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, asks: bool) -> str:
    """The conversation as the tokenizer's template writes it; `asks`: with the opening of an answer.

    Raises:
        DataError: the template fails, or takes more than `MOST_SECONDS` or `renderer.MOST_MEMORY`.
    """
    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
        # a tokenizer with a way of its own, which is no template
        return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=asks)
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise DataError(f"the tokenizer has no chat template for conversations: {error}") from None
    asked = {
        "template": template,
        "messages": [{name: value for name, value in m.items() if value is not None} for m in messages],
        "asks": asks,
        "tokens": tokenizer.special_tokens_map,
    }
    with _LOCK:
        found = _serving().ask(json.dumps(asked, default=str))
    if "error" in found:
        raise DataError(f"the chat template refuses the messages: {found['error']}")
    return found["text"]


class _Renderer:
    """The process, and the pipes to it."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("renderer.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._send(json.dumps(sys.path))
        _, why = self._receive(START_SECONDS)
        if why:
            self.close()
            raise RuntimeError(f"the process that renders chat templates did not start: {why}")

    def ask(self, line: str) -> dict[str, str]:
        """Its answer; after one that did not come, the process is gone."""
        self._send(line)
        content, why = self._receive(MOST_SECONDS)
        if why:
            self.close()
            return {"error": why}
        return json.loads(content)

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            # what it died of shows where the answer should be
            return

    def _receive(self, seconds: float) -> tuple[bytes, str | None]:
        """A line, or why there is none."""
        assert self._process.stdout is not None
        content, pipe, deadline = bytearray(), self._process.stdout.fileno(), time.monotonic() + seconds
        while not content.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                return b"", f"it takes more than {seconds:.0f} seconds"
            more = os.read(pipe, 2**16)
            if not more:
                return b"", "it ends the process that renders it, most likely for its memory"
            content += more
            if len(content) > MOST_ANSWER:
                return b"", f"it writes more than {MOST_ANSWER >> 20} MiB"
        return bytes(content), None

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                continue

    @property
    def is_alive(self) -> bool:
        """Whether this process started it, and it runs."""
        return self.owner == os.getpid() and self._process.poll() is None


_LOCK = threading.Lock()
_RUNNING: list[_Renderer] = []


def _serving() -> _Renderer:
    if not _RUNNING or not _RUNNING[0].is_alive:
        _RUNNING[:] = [_Renderer()]
    return _RUNNING[0]


@atexit.register
def _close() -> None:
    for renderer in _RUNNING:
        if renderer.is_alive:
            renderer.close()
    _RUNNING.clear()
