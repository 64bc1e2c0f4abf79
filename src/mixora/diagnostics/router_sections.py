"""The sections of a report that show the routers: verdict, load, depth, groups of rows, tokens, experts alike."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from mixora.diagnostics.charts import draw_heat, draw_lines, draw_scale
from mixora.diagnostics.page import is_number, write_fold, write_table
from mixora.diagnostics.places import group_by_kind, name_site, spread_over_depth
from mixora.diagnostics.record import GroupLoad, RunRecord, Similar, SiteRouting, Token, Typical
from mixora.diagnostics.typical import LEAST_SCORE, LEAST_SEEN
from mixora.diagnostics.verdict import (
    THRESHOLDS,
    TWIN,
    Finding,
    entropy_share,
    evenness_of,
    find_twins,
    judge_routers,
    likeness,
)

LIVE = "routing/"
LIVE_TITLES = {
    "entropy": "Entropy of the routers",
    "evenness": "Evenness of the load",
    "largest_share": "Share of tokens at the busiest expert",
    "dropped_share": "Choices dropped by capacity",
    "dead_experts": "Experts without a token, per site",
}
MOST_PAIRS = 12
_VISIBLE = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}


def write_findings(record: RunRecord) -> str:
    """The verdict on the routers with advice, and the thresholds behind it."""
    findings = judge_routers(record)
    if not findings:
        return ""
    rules = "".join(f"<li>{escape(rule)}</li>" for rule in THRESHOLDS)
    items = "".join(map(_write_finding, findings))
    return f'<ul class="findings">{items}</ul>{write_fold("How this is judged", f"<ul>{rules}</ul>")}'


def _write_finding(finding: Finding) -> str:
    word = {"good": "✓ Good.", "remark": "\N{BULLET} Note.", "warning": "⚠ Warning."}[finding.kind]
    advice = f'<span class="advice">{escape(finding.advice)}</span>' if finding.advice else ""
    return f'<li class="{finding.kind}"><b>{word}</b> {escape(finding.text)}{advice}</li>'


def write_load(routing: Sequence[SiteRouting]) -> str:
    """A heat map for each kind of site: layers down, experts across."""
    sites = [row for row in routing if row.get("load")]
    if not sites:
        return _write_all_sites(routing)
    panels = "".join(
        draw_heat(kind, {label: row["load"] for label, row in rows}, along="layer")
        for kind, rows in group_by_kind(sites).items()
    )
    words = "<p>In per cent, the share of the choices that fell on each expert (across) of each layer (down).</p>"
    return f'{words}{draw_scale("no token")}<div class="panels">{panels}</div>{_write_all_sites(routing)}'


def _write_all_sites(routing: Sequence[SiteRouting]) -> str:
    rows = [{**row, "dead_experts": _name_dead(row.get("dead_experts") or [])} for row in routing]
    words = "<p>Entropies in nats; the largest is that of even probabilities.</p>"
    return write_fold("All sites as a table", words + write_table(rows, bars="load")) if rows else ""


def _name_dead(experts: Sequence[int]) -> str:
    if not experts:
        return "none"
    names = " and ".join(filter(None, [", ".join(map(str, experts[:-1])), str(experts[-1])]))
    return f"{names} {'get' if len(experts) > 1 else 'gets'} no tokens"


def write_depth(routing: Sequence[SiteRouting]) -> str:
    """Entropy, evenness and dropped choices over the layers, a line for each kind of site."""
    charts = [
        draw_lines("Entropy of the router, share of its maximum", _over_depth(routing, entropy_share), "layer", True),
        draw_lines("Evenness of the load", _over_depth(routing, evenness_of), "layer", True),
        draw_lines("Choices dropped by capacity", _over_depth(routing, _dropped), "layer", True),
    ]
    if not any(charts):
        return ""
    words = (
        "<p>The entropy of a router is low where it is sure about each token, and largest where it is undecided. "
        "Evenness is 100 % where all experts get the same share of the choices, 0 % where all tokens use the same few. "
        "Dropped is what the limit of capacity would turn away in training.</p>"
    )
    return f'{words}<div class="charts">{"".join(charts)}</div>'


def _over_depth(
    rows: Sequence[Any], read: Callable[[Any], float | None]
) -> dict[str, list[tuple[float, float | None]]]:
    kinds = group_by_kind(rows)
    return {kind: [(int(label or 0), read(row)) for label, row in of_kind] for kind, of_kind in kinds.items()}


def _dropped(site: SiteRouting) -> float | None:
    return site.get("dropped_share")


def write_live(history: Sequence[Mapping[str, Any]]) -> str:
    """What the routers did while they were trained: means over the sites."""
    charts = []
    for name, title in LIVE_TITLES.items():
        points = [(row["step"], row.get(LIVE + name)) for row in history if "step" in row]
        charts.append(draw_lines(title, {name: points}, "step", is_share=name != "dead_experts"))
    return f'<div class="charts">{"".join(charts)}</div>' if any(charts) else ""


def write_groups(load: GroupLoad | None) -> str:
    """Which group of rows reaches which expert, at three sites, and how far groups lie apart over the depth."""
    if not load or not load["sites"]:
        return ""
    panels = [
        draw_heat(name_site(load["sites"][n]), dict(zip(load["groups"], load["load"][n], strict=False)))
        for n in spread_over_depth(load["sites"])
    ]
    apart = [
        {"path": path, "apart": _distance(groups)} for path, groups in zip(load["sites"], load["load"], strict=False)
    ]
    lines = _over_depth(apart, lambda row: row["apart"])
    words = (
        "<p>In per cent, the share of each group's choices that fell on each expert, at the first, middle and last "
        "site of one kind. Expert 0 of one layer has nothing to do with expert 0 of the next.</p>"
    )
    chart = draw_lines("How far the groups lie apart", lines, "layer", True) if len(load["groups"]) > 1 else ""
    if chart:
        chart += (
            '<p class="soft">Mean share of a group\'s choices that would have to move to another expert to match the '
            "mean of all groups: 0 % if the groups use the experts alike.</p>"
        )
    return f'{words}{draw_scale("no token of the group")}<div class="panels">{"".join(panels)}</div>{chart}'


def _distance(groups: Sequence[Sequence[float | None]]) -> float | None:
    """The mean total variation distance of the groups from their mean."""
    whole = [[float(share or 0.0) for share in group] for group in groups if all(map(is_number, group))]
    if not whole:
        return None
    means = [sum(column) / len(whole) for column in zip(*whole, strict=True)]
    gaps = [sum(abs(share - mean) for share, mean in zip(group, means, strict=True)) / 2 for group in whole]
    return sum(gaps) / len(gaps)


def write_typical(typical: Sequence[Typical], strongest: Sequence[Typical]) -> str:
    """The tokens that an expert gets far more often than others do, site after site."""
    if not strongest and not any(row.tokens for row in typical):
        return ""
    words = (
        f"<p>Tokens, seen {LEAST_SEEN} times or more, that reach an expert far more often than other tokens do (by "
        f"{LEAST_SCORE:g} standard errors, roughly), the clearest first. Behind each, how many per cent of its "
        "occurrences went to the expert; beside the expert, how many of all tokens do. ␣ is a space, ↵ a new line.</p>"
    )
    sites: dict[str, list[Typical]] = {}
    for row in typical:
        sites.setdefault(row.path, []).append(row)
    blocks = [
        f'<h3>{escape(name_site(path))}</h3><dl class="typical">{"".join(map(_write_expert, rows))}</dl>'
        for path, rows in sites.items()
    ]
    most = [
        {
            "site": name_site(row.path),
            "expert": str(row.expert),
            "token": show_token(token.text),
            "seen": token.count,
            "of it share": token.share,
            "of all tokens share": row.usual,
        }
        for row in strongest
        for token in row.tokens
    ]
    return words + "".join(blocks) + write_fold("The clearest tokens over all sites", write_table(most))


def _write_expert(row: Typical) -> str:
    tokens = "".join(map(_write_token, row.tokens)) or '<span class="soft">no token stands out</span>'
    usual = f'<span class="soft">{row.usual:.0%}</span>'
    return f"<div><dt>expert {row.expert} · {usual}</dt><dd>{tokens}</dd></div>"


def _write_token(token: Token) -> str:
    words = f"{token.share:.0%} of {token.count}; score {token.score:.1f}"
    return f'<span class="token" title="{words}">{escape(show_token(token.text))} <i>{token.share:.0%}</i></span>'


def show_token(text: str) -> str:
    """A token with its blanks visible; what would act on the text around it (control, direction) as its code."""
    return "".join(_VISIBLE.get(sign) or _show_sign(sign) for sign in text) or "∅"


def _show_sign(sign: str) -> str:
    return f"\\u{ord(sign):04x}" if unicodedata.category(sign) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") else sign


def write_similar(similar: Sequence[Similar]) -> str:
    """The most similar pairs of experts in words and as a table."""
    if not similar:
        return ""
    twins = {(pair.path, pair.first, pair.second) for pair in find_twins(similar)}
    pairs = sorted(similar, key=likeness, reverse=True)[:MOST_PAIRS]
    rows = [
        {
            "site": name_site(pair.path),
            "experts": f"{pair.first}, {pair.second}",
            "cosine of weights": pair.cosine,
            "correlation of routing": pair.correlation,
            "": "twins" if (pair.path, pair.first, pair.second) in twins else "",
        }
        for pair in pairs
    ]
    sites = len({pair.path for pair in similar})
    count = f"{len(twins)} pair{'s' * (len(twins) != 1)} of twins"
    words = f"<p>{count} (cosine or correlation of {TWIN:g} or more) at {sites} measured sites.</p>"
    return words + write_fold("The most similar pairs", write_table(rows))
