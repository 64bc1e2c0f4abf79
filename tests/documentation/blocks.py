"""The fenced blocks of the repository's pages."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("benchmarks/**/*.md"))]
FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")


@dataclass(frozen=True)
class Block:
    """`title`: the file that the block is. `follows`: the language of the code before it, below the same heading."""

    page: str
    line: int
    language: str
    title: str | None
    text: str
    follows: str | None

    @property
    def first_line(self):
        return self.text.partition("\n")[0]


def read_blocks(path):
    """All blocks of a page in order; a fence that nothing closes is a `ValueError`."""
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), start=1))
    page = str(path.relative_to(ROOT))
    follows = None
    for number, line in lines:
        opening = FENCE.fullmatch(line)
        if opening is None:
            follows = None if re.match("#+ ", line) else follows
            continue
        indent, fence, said = opening.groups()
        language, _, rest = said.strip().partition(" ")
        title = re.search(r'title="([^"]+)"', rest)
        text = "".join(_take_until(lines, fence, len(indent), f"{page}:{number}"))
        yield Block(page, number, language, title and title[1], text, follows)
        follows = language or follows


def _take_until(lines, fence, indent, place):
    for _, line in lines:
        if line.strip() == fence:
            return
        yield line[indent:] + "\n"
    raise ValueError(f"{place}: nothing closes this block")


BLOCKS = [block for path in PAGES for block in read_blocks(path)]
