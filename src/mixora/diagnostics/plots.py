"""Figures of a run, drawn from plain data: the loss over the steps, and which expert reads which domain.

Figures are made without pyplot, so nothing global changes and nothing needs a display. The colours (Okabe and Ito's
palette, cividis) stay apart under every common form of colour blindness.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mixora.diagnostics.places import spread_over_depth

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
WIDTH = 5.0  # inches; narrow, so that the letters stay readable on a phone
LONGEST_NAME = 24
MOST_LABELLED = 10  # experts; beyond that a number does not fit into its cell


def plot_loss(history: Sequence[Mapping[str, Any]]) -> Figure:
    """The training loss (nats) over the optimizer steps, and below it each auxiliary term that the history holds.

    `history` rows hold `step`, `loss` and any auxiliary terms; a term missing from a row, or not finite, leaves a gap.
    """
    terms = list(dict.fromkeys(key for row in history for key in row if key not in ("step", "loss")))
    figure = _make_figure(height=4.4 if terms else 2.8)
    rows = figure.subplots(2 if terms else 1, 1, sharex=True, squeeze=False)[:, 0]
    _draw_lines(rows[0], history, ["loss"])
    rows[0].set_ylabel("training loss (nats)")
    if terms:
        _draw_lines(rows[1], history, terms)
        rows[1].set_ylabel("auxiliary terms")
        for text in rows[1].legend(frameon=False, fontsize=10).get_texts():
            text.set_parse_math(False)
    rows[-1].set_xlabel("optimizer step")
    rows[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def plot_expert_load(load: Mapping[str, Any]) -> Figure:
    """Heat maps of the share of each domain's tokens that each expert gets: rows = domains, columns = experts.

    `load` holds `groups` (G names), `sites` (S paths) and `load`, nested `[S][G][E]`, each innermost list adding up to
    1, or not finite for a domain without tokens; E may differ between sites. Drawn are up to three sites of one kind:
    first, middle and last. Not the mean over sites: expert 0 of one layer has nothing to do with expert 0 of the next,
    so a mean would look even.
    """
    chosen = spread_over_depth(load["sites"])
    groups = load["groups"]
    figure = _make_figure(height=0.9 + len(chosen) * (0.6 + 0.24 * len(groups)))
    panels = figure.subplots(len(chosen), 1, squeeze=False)[:, 0]
    shares = {site: [[_finite(share) for share in row] for row in load["load"][site]] for site in chosen}
    top = max((share for rows in shares.values() for row in rows for share in row if share > 0), default=1.0)
    for panel, site in zip(panels, chosen, strict=True):
        image = _draw_shares(panel, shares[site], groups, top)
        panel.set_title(load["sites"][site], fontsize=10, loc="left", parse_math=False)
    panels[-1].set_xlabel("expert")
    scale = PercentFormatter(1.0, decimals=0)
    bar = figure.colorbar(
        image, ax=list(panels), location="bottom", format=scale, fraction=0.2 / figure.get_figheight()
    )
    bar.set_label("share of the domain's tokens")
    return figure


def save_png(figure: Figure, path: str | Path) -> Path:
    """Write `figure` as a PNG of 200 dots per inch and return where it lies."""
    with warnings.catch_warnings():
        # letters that the font lacks become boxes; the page has them
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        # Without the software's name the same numbers give the same bytes under every matplotlib.
        figure.savefig(path, format="png", dpi=200, metadata={"Software": None})
    return Path(path)


def _make_figure(height: float) -> Figure:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _draw_lines(axes: Axes, history: Sequence[Mapping[str, Any]], terms: Sequence[str]) -> None:
    steps = [row["step"] for row in history]
    for place, term in enumerate(terms):
        values = [_finite(row.get(term)) for row in history]
        (line,) = axes.plot(steps, values, label=term, linewidth=1.6)
        line.set(color=COLOURS[place % len(COLOURS)], linestyle=DASHES[place % len(DASHES)])
        if len(steps) == 1:  # a lone point has no line to show
            line.set_marker("o")
            axes.set_xlim(steps[0] - 1, steps[0] + 1)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _finite(value: float | None) -> float:
    return math.nan if value is None or not math.isfinite(value) else value


def _draw_shares(axes: Axes, shares: Sequence[Sequence[float]], groups: Sequence[str], top: float) -> AxesImage:
    image = axes.imshow(shares, cmap="cividis", vmin=0.0, vmax=top, aspect="auto")
    experts = len(shares[0])
    axes.set_yticks(range(len(groups)), [_shorten(name) for name in groups], parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(experts, 10), min_n_ticks=1))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if experts <= MOST_LABELLED:
        for row, values in enumerate(shares):
            _label_row(axes, row, values, top)
    return image


def _shorten(name: str) -> str:
    """A name that leaves room for what it stands beside."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _label_row(axes: Axes, row: int, values: Sequence[float], top: float) -> None:
    for column, share in enumerate(values):
        if math.isnan(share):  # a domain without tokens; imshow leaves its cells blank
            continue
        colour = "black" if share > 0.55 * top else "white"
        axes.text(column, row, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=9)
