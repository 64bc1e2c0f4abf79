"""The other side of `templates`: a process that renders chat templates and nothing else, run as a script.

Reads a JSON line per conversation from standard input and answers each with one. What a template wastes, time or
memory, is wasted here, where it can be ended.
"""

import json
import sys
from typing import Any

from jinja2 import TemplateError

MOST_MEMORY = 2**30


def main() -> None:
    """Say that all is ready, and answer until standard input ends; the first line is the path to import from."""
    sys.path[:] = json.loads(sys.stdin.readline())
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    _answer({})
    for line in sys.stdin:
        asked = json.loads(line)
        _answer(_render(render_jinja_template, asked))


def _limit_memory() -> None:
    """Of the whole process, where the system can: not on Windows, and macOS heeds it not."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    except (ImportError, ValueError, OSError):
        return


def _render(render: Any, asked: dict[str, Any]) -> dict[str, str]:
    try:
        texts, _ = render(
            [asked["messages"]],
            chat_template=asked["template"],
            add_generation_prompt=asked["asks"],
            **asked["tokens"],
        )
    except MemoryError:
        return {"error": f"it needs more than {MOST_MEMORY >> 20} MiB"}
    except TemplateError as error:
        return {"error": str(error)[:500]}
    except Exception as error:
        # a template is a program, and may fail as one
        return {"error": f"{type(error).__name__}: {error}"[:500]}
    return {"text": texts[0]}


def _answer(found: dict[str, str]) -> None:
    try:
        line = json.dumps(found)
    except MemoryError:
        line = json.dumps({"error": f"it needs more than {MOST_MEMORY >> 20} MiB"})
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
