"""What is printed for people: text from files and models is shown as it stands, and can neither style nor steer."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def show_controls(text: str) -> str:
    """`text` with a visible sign in place of each control character (C0, DEL, C1) but line feed and tab."""
    return text.translate(_CONTROLS)


class Console(RichConsole):
    """rich's console for which a string is text: no markup, no emoji codes, no control characters.

    What is to be styled is a `rich.text.Text` or has its `style` said beside it.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, markup=False, emoji=False)

    def show(self, part: RenderableType) -> None:
        """A part of a summary: a string is there to be copied, so its lines are never broken; anything else wraps."""
        self.print(part, soft_wrap=isinstance(part, str))

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does, so that a sign in place of a control character counts where a width is measured."""
        return super().render_str(show_controls(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does, with control characters made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=show_controls(segment.text))
