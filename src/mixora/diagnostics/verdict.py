"""What the figures of the routers mean, in plain words, and which settings to try. The thresholds are our choice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from mixora.diagnostics.collapse import COLLAPSED, measure_evenness
from mixora.diagnostics.places import name_site
from mixora.diagnostics.record import RunRecord, Similar, SiteRouting

TWIN = 0.95
LEAST_TOKENS = 20
MANY_DROPPED = 0.1
UNDECIDED = 0.99
MOST_NAMED = 4

AGAINST_COLLAPSE = (
    "Try a larger losses.load_balance.coefficient (ten times is a fair first step), a smaller learning_rate or more "
    "warmup_steps, or losses.z_loss.coefficient=0.001, which keeps the router's logits small."
)
THRESHOLDS = (
    "An expert is dead if no token of the held-out rows reaches it.",
    f"A router has collapsed if the evenness of its load is below {COLLAPSED:g}. Evenness is 1 where all experts get "
    "the same share and 0 where all tokens go to the same few; with one of eight experts per token, "
    f"{COLLAPSED:g} is reached where one takes about 95 %.",
    f"Two experts are twins if the cosine of their weights or the correlation of their routing is {TWIN:g} or more. "
    f"The routing of an expert that fewer than {LEAST_TOKENS} tokens reach, or do not reach, is not compared.",
    f"Many choices are dropped if the limit of capacity would turn away {MANY_DROPPED:.0%} or more of them at a site.",
    f"A router is undecided if the entropy of its probabilities is {UNDECIDED:.0%} of its maximum or more.",
)


@dataclass(frozen=True)
class Finding:
    """One thing to know: `warning` if something should be changed, `remark` if it may be as wished."""

    kind: Literal["good", "remark", "warning"]
    text: str
    advice: str = ""


def judge_routers(record: RunRecord) -> list[Finding]:
    """What the figures in a record say of its routers, the gravest first; empty where nothing was routed."""
    sites = record.routing
    if not sites:
        return []
    found = [
        _judge_collapse(sites),
        _judge_dead(sites),
        _judge_twins(record.similar, len(sites)),
        _judge_dropped(sites),
        _judge_undecided(sites),
    ]
    findings = [finding for finding in found if finding is not None]
    if any(finding.kind == "warning" for finding in findings):
        return findings
    alike = " and no two are alike" if record.similar else ""
    good = f"At all {len(sites)} sites" if len(sites) > 1 else "At the one site"
    return [Finding("good", f"{good} every expert is used{alike}; no router has collapsed."), *findings]


def evenness_of(site: SiteRouting) -> float | None:
    """The evenness of a site's load; None where it was not measured."""
    return measure_evenness(site.get("load") or [], site.get("experts_per_token") or 1.0)


def name_some(names: Iterable[str], most: int = MOST_NAMED) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _judge_collapse(sites: Sequence[SiteRouting]) -> Finding | None:
    hit = [site for site in sites if (value := evenness_of(site)) is not None and value < COLLAPSED]
    if not hit:
        return None
    where = name_some(name_site(site["path"]) for site in hit)
    text = f"{_of(hit, sites)} collapsed: nearly all tokens go to the same experts ({where})."
    return Finding(
        "warning",
        text,
        AGAINST_COLLAPSE,
    )


def _judge_dead(sites: Sequence[SiteRouting]) -> Finding | None:
    hit = [site for site in sites if site.get("dead_experts")]
    if not hit:
        return None
    where = name_some(f"{name_site(site['path'])}: {_name_experts(site['dead_experts'])}" for site in hit)
    return Finding(
        "warning",
        f"{_of(hit, sites)} an expert that no token reaches ({where}).",
        "Try a larger losses.load_balance.coefficient or a larger top_k; if the experts stay dead, a smaller "
        "num_experts trains the same model with fewer parameters. Few held-out rows can leave an expert unused by "
        "chance: evaluate.limit sets their number.",
    )


def _judge_twins(similar: Sequence[Similar], count: int) -> Finding | None:
    twins = find_twins(similar)
    if not twins:
        return None
    where = name_some(_name_twins(pair) for pair in twins)
    sites = len({pair.path for pair in twins})
    return Finding(
        "warning",
        f"At {sites} of {count} sites two experts do nearly the same ({where}).",
        "Try a smaller num_experts, or a larger expert_dropout, which makes tokens use other experts too; after a "
        "short run, more steps may be all that is missing.",
    )


def find_twins(similar: Iterable[Similar]) -> list[Similar]:
    """The pairs above the threshold, the most similar first."""
    twins = [pair for pair in similar if likeness(pair) >= TWIN]
    return sorted(twins, key=likeness, reverse=True)


def likeness(pair: Similar) -> float:
    """The larger of cosine and correlation."""
    return max(value if value is not None else -1.0 for value in (pair.cosine, pair.correlation))


def _name_twins(pair: Similar) -> str:
    values = {"cosine of the weights": pair.cosine, "correlation of the routing": pair.correlation}
    said = [f"{name} {value:.2f}" for name, value in values.items() if value is not None and value >= TWIN]
    return f"{name_site(pair.path)}: experts {pair.first} and {pair.second}, {', '.join(said)}"


def _judge_dropped(sites: Sequence[SiteRouting]) -> Finding | None:
    hit = [site for site in sites if (site.get("dropped_share") or 0.0) >= MANY_DROPPED]
    if not hit:
        return None
    worst = max(hit, key=lambda site: site["dropped_share"] or 0.0)
    return Finding(
        "remark",
        f"{_of(hit, sites)} {MANY_DROPPED:.0%} or more of the choices dropped by the limit of capacity in training; "
        f"most at {name_site(worst['path'])}, {worst['dropped_share']:.0%}.",
        "Try a larger capacity_factor, or a larger losses.load_balance.coefficient, which evens out the load.",
    )


def _judge_undecided(sites: Sequence[SiteRouting]) -> Finding | None:
    hit = [site for site in sites if (value := entropy_share(site)) is not None and value >= UNDECIDED]
    if 2 * len(hit) < len(sites):
        return None
    return Finding(
        "remark",
        f"{_of(hit, sites)} a router that is all but undecided between its experts: they hardly specialise.",
        "After a short run this is to be expected. Else try more steps, a larger learning_rate, or a "
        "smaller losses.load_balance.coefficient or losses.z_loss.coefficient.",
    )


def entropy_share(site: SiteRouting) -> float | None:
    """The entropy of the router's probabilities as a share of its maximum; None where there is none."""
    entropy, most = site.get("entropy"), site.get("max_entropy")
    return entropy / most if entropy is not None and most else None


def _of(hit: Sequence[SiteRouting], sites: Sequence[SiteRouting]) -> str:
    return f"{len(hit)} of {len(sites)} site{'s' * (len(sites) > 1)} {'have' if len(hit) > 1 else 'has'}"


def _name_experts(experts: Sequence[int]) -> str:
    return f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))}"
