"""Parts of a page: sections, tables, figures and small bars, each as escaped HTML text.

`report.html` is the frame and the style. Nothing in it needs a script, and its policy forbids the browser to fetch
anything, so a page opens anywhere and tells nobody.
"""

import base64
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any, TypeGuard

NOTHING = "\N{EN DASH}"
SHARES = ("accuracy", "match", "share")
MANY_SECTIONS = 4  # from here on a list of them stands at the top
_HEADING = re.compile(r'<h2 id="([a-z0-9-]+)">(.*?)</h2>')


def write_page(title: str, subtitle: str, sections: Iterable[str]) -> str:
    """The whole page; `title` and `subtitle` are plain text, `sections` are HTML, of which empty ones are left out."""
    frame = Template((files("mixora.diagnostics") / "report.html").read_text(encoding="utf-8"))
    body = "\n".join(filter(None, sections))
    body = _write_contents(_HEADING.findall(body)) + body
    return frame.substitute(title=escape(title), subtitle=escape(subtitle), body=body)


def _write_contents(headings: Sequence[tuple[str, str]]) -> str:
    links = "".join(f'<a href="#{name}">{title}</a>' for name, title in headings)
    return f"<nav>{links}</nav>\n" if len(headings) >= MANY_SECTIONS else ""


def write_section(title: str, content: str) -> str:
    """A heading and HTML below it; nothing if there is no content."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    return f'<h2 id="{name}">{escape(title)}</h2>\n{content}' if content else ""


def write_fold(summary: str, content: str) -> str:
    """HTML that opens on a click."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def write_code(text: str) -> str:
    """A command or other text to copy."""
    return f"<pre><code>{escape(text)}</code></pre>"


def write_figure(png: bytes | None, caption: str) -> str:
    """A PNG inside the page, with its caption; nothing if there is no picture."""
    if png is None:
        return ""
    source = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    caption = escape(caption)
    return f'<figure><img src="{source}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def write_table(rows: Sequence[Mapping[str, Any]], numeric: Sequence[str] = (), bars: str | None = None) -> str:
    """A table whose columns are the rows' keys; numbers stand to the right, the column `bars` is drawn."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    right = {c for c in columns if c in numeric or any(isinstance(row.get(c), int | float) for row in rows)}
    kind = {column: ' class="number"' if column in right else "" for column in columns}
    head = "".join(f"<th{kind[c]}>{escape(c.replace('_', ' '))}</th>" for c in columns)
    lines = []
    for row in rows:
        cells = (
            _draw_bars(row[c]) if c == bars and row.get(c) else escape(format_value(row.get(c), c)) for c in columns
        )
        lines.append("".join(f"<td{kind[c]}>{cell}</td>" for c, cell in zip(columns, cells, strict=True)))
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _draw_bars(shares: Sequence[float]) -> str:
    shares = [share if is_number(share) else 0.0 for share in shares]
    top = max(shares) or 1.0
    bars = "".join(f'<i style="height:{share / top:.0%}"></i>' for share in shares)
    words = ", ".join(f"{share:.0%}" for share in shares)
    return f'<span class="bars" role="img" aria-label="{words}" title="{words}">{bars}</span>'


def format_value(value: Any, name: str = "") -> str:
    """A cell's text: counts with separators, shares in per cent, three digits of other numbers, a dash for nothing.

    What is a share shows from `name`: accuracies, matches, and whatever calls itself a share.
    """
    if value is None or value == [] or (isinstance(value, float) and not math.isfinite(value)):
        return NOTHING
    if isinstance(value, list | tuple):
        return (" → " if name == "shape" else ", ").join(format_value(part) for part in value)
    if isinstance(value, float):
        if is_named(name, SHARES):
            return f"{value:.1%}"
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number, and far enough from infinity to be drawn and subtracted."""
    return isinstance(value, int | float) and -1e300 <= value <= 1e300


def is_named(name: str, words: Iterable[str]) -> bool:
    """Whether any of `words` stands in `name`."""
    return any(word in name.lower() for word in words)
