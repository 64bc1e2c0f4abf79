"""Foreign text in Markdown, YAML and Python: it stays text, on one line, whatever it holds."""

import json
from collections.abc import Iterable, Iterator

from mixora.display.console import show_controls


def on_one_line(text: object) -> str:
    """Words with a space between them: a line that is a mark of YAML or Markdown ends what it stands in."""
    return " ".join(show_controls(str(text)).split())


def quote(text: object) -> str:
    """As code in Markdown."""
    return "`" + on_one_line(text).replace("`", "'") + "`"


def literal(text: str) -> str:
    """A string of Python and of YAML."""
    return json.dumps(text, ensure_ascii=False)


def make_table(columns: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    """The lines of a table. Cells that may hold foreign text are quoted by the caller."""
    columns = tuple(columns)
    yield _line(columns)
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield _line(row)


def _line(cells: Iterable[object]) -> str:
    # a bar ends a cell even inside of code
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
