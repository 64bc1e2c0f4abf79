"""Charts of a page as HTML: lines over a scale, and tables whose cells are coloured by their numbers.

None of them is a picture. Colours are classes, to which `report.html` gives values for light and for dark; letters are
the page's own, so they keep their size on a narrow screen and can be selected. Lines have Okabe and Ito's colours and
differ in their dashes too, cells have the scale cividis (Nuñez, Anderton and Renslow 2018) and show their number: both
can be told apart under every common form of colour blindness.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

from mixora.diagnostics.page import NOTHING, format_value, is_number

Points = Sequence[tuple[float, float | None]]
"""Places from left to right with the value there; None, or what is not finite, leaves a gap."""

LINE_COLOURS, DASHES, LEVELS = 7, 4, 10
TOP = 3  # times the even share: the last colour
MOST_NUMBERED = 16  # columns; beyond that a number does not fit into its cell
MOST_POINTS = 240  # of a line
CROSS = "\N{MULTIPLICATION SIGN}"
_SPAN = 1000  # the side of a plot in its own units


def draw_lines(title: str, lines: Mapping[str, Points], across: str, is_share: bool = False) -> str:
    """A chart of named lines; nothing without a finite value. `across` names the horizontal axis.

    The vertical axis begins at 0, or below; with `is_share` it is in per cent. Long lines are drawn through the means
    of neighbouring points.
    """
    lines = {name: _thin(points) for name, points in lines.items()}
    values = [value for points in lines.values() for _, value in points if is_number(value)]
    places = [place for points in lines.values() for place, _ in points]
    if not values:
        return ""
    up = find_ticks(min(0.0, *values), max(values))
    along = find_ticks(min(places), max(places), is_whole=True)
    low, high, left, right = up[0], max(up[-1], max(values)), min(places), max(places)
    grid = "".join(f"M0 {_down(tick, low, high)}H{_SPAN}" for tick in up)
    drawn = [f'<path class="grid" d="{grid}"/>']
    for number, (name, points) in enumerate(lines.items()):
        path = _trace([(_right(place, left, right), value) for place, value in points], low, high)
        drawn.append(f'<path class="{_style(number)}" d="{path}"><title>{escape(name)}</title></path>')
    words = escape(f"{title}: {', '.join(lines)}")
    labels = [f'<span style="top:{_down(tick, low, high) / 10:g}%">{_label(tick, is_share)}</span>' for tick in up]
    below = [_write_tick(tick, _right(tick, left, right)) for tick in along if left <= tick <= right]
    return (
        f'<figure class="chart"><figcaption><b>{escape(title)}</b> by {escape(across)}</figcaption>'
        f'<div class="plot"><div class="up">{"".join(labels)}</div>'
        f'<svg viewBox="0 0 {_SPAN} {_SPAN}" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'{"".join(drawn)}</svg><div class="across">{"".join(below)}</div></div>'
        f"{_write_legend(list(lines)) if len(lines) > 1 else ''}</figure>"
    )


def draw_heat(title: str, rows: Mapping[str, Sequence[float | None]], across: str = "expert", along: str = "") -> str:
    """A table of shares, coloured by how they compare with even ones; 0 is a cross, what is not known a dash.

    The columns are numbered from 0, `across` says what they are and `along` what the rows are.
    """
    columns = max(map(len, rows.values()), default=0)
    is_narrow = columns > MOST_NUMBERED
    head = "".join(f"<th>{'' if is_narrow and column % 8 else column}</th>" for column in range(columns))
    body = []
    for label, shares in rows.items():
        cells = "".join(_draw_cell(share, len(shares), is_narrow) for share in shares)
        body.append(f'<tr><th title="{escape(label)}">{escape(label)}</th>{cells}</tr>')
    corner = escape(f"{along} ╲ {across}" if along else across)
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><div class="wide">'
        f'<table class="heat{" narrow" if is_narrow else ""}" aria-label="{escape(title)}: share by {corner}">'
        f"<thead><tr><th></th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div></figure>"
    )


def draw_scale(cross: str) -> str:
    """What the colours of `draw_heat` mean; `cross` says what a share of 0 is."""
    steps = "".join(f'<i class="h{level}"></i>' for level in range(LEVELS + 1))
    return (
        f'<p class="scale"><span>{steps}</span> from 0 to {TOP} times the even share and more · '
        f"{CROSS} {escape(cross)}</p>"
    )


def find_ticks(low: float, high: float, is_whole: bool = False) -> list[float]:
    """Round numbers from at most `low` to at least the last multiple below `high`: 3 to 6 of them, evenly spaced."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    step = max(round(step), 1) if is_whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def _thin(points: Points) -> Points:
    """At most `MOST_POINTS` points: the means of as many neighbours as it takes."""
    size = math.ceil(len(points) / MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else []
    return [(part[-1][0], _mean([value for _, value in part if is_number(value)])) for part in parts] or points


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _right(place: float, left: float, right: float) -> int:
    return round(_SPAN * (place - left) / (right - left)) if right > left else _SPAN // 2


def _down(value: float, low: float, high: float) -> int:
    return round(_SPAN * (high - value) / (high - low))


def _trace(points: Points, low: float, high: float) -> str:
    """The path through the points; a point between two gaps becomes a dot."""
    path, is_open = [], False
    for place, value in points:
        if not is_number(value):
            is_open = False
            continue
        path.append(f"{'L' if is_open else 'M'}{place:g} {_down(value, low, high)}{'' if is_open else 'h0'}")
        is_open = True
    return "".join(path)


def _write_tick(tick: float, place: int) -> str:
    # the last one must not stand out of the page
    is_last = ' class="last"' if place > 0.95 * _SPAN else ""
    return f'<span{is_last} style="left:{place / 10:g}%">{tick:,.0f}</span>'


def _style(number: int) -> str:
    return f"line c{number % LINE_COLOURS} d{number % DASHES}"


def _label(tick: float, is_share: bool) -> str:
    return f"{tick:.0%}" if is_share else format_value(float(tick))


def _write_legend(names: Sequence[str]) -> str:
    marks = [f'<svg viewBox="0 0 32 8"><path class="{_style(n)}" d="M0 4H32"/></svg>' for n in range(len(names))]
    items = (f"<li>{mark}{escape(name)}</li>" for mark, name in zip(marks, names, strict=True))
    return f'<ul class="legend">{"".join(items)}</ul>'


def _draw_cell(share: float | None, columns: int, is_narrow: bool) -> str:
    if not is_number(share):
        return f"<td>{'' if is_narrow else NOTHING}</td>"
    words = f' title="{share:.1%}"'
    if share <= 0:
        return f'<td class="none"{words}>{"" if is_narrow else CROSS}</td>'
    level = min(round(LEVELS * share * columns / TOP), LEVELS)
    number = "" if is_narrow else f"{100 * share:.0f}"
    return f'<td class="h{level}"{words}>{number}</td>'
