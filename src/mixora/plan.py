"""Rules x model -> plan: the table of sites, printed before training and stored with the adapter."""

import io
import math
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import nn

from mixora.assignment import assign_rules, settle_rules
from mixora.contracts import Expert, PassLoss, Shape, SiteLoss, kept_shapes
from mixora.depth import fix, varies
from mixora.errors import CheckpointError, ConfigError
from mixora.experts import EXPERTS
from mixora.kernels import KERNELS
from mixora.kernels.choice import Choice, Served
from mixora.losses import LOSSES
from mixora.method import Method, Rule
from mixora.mixture import Mixture, Parts
from mixora.passes import Stream
from mixora.routers import ROUTERS
from mixora.sites import Linear, places_of


@dataclass(frozen=True)
class Site:
    """One adapted module. `ranks`: rank of each expert. `leader`: path of the site whose router this one uses.

    `parameters`: trainable numbers, the router's included; `active_parameters`: those a token is computed with.
    """

    path: str
    rule: str
    in_features: int
    out_features: int
    expert: str
    ranks: tuple[int, ...]
    router: str
    num_experts: int
    top_k: int
    kernel: str
    scale: float
    stream: Stream
    leader: str | None
    parameters: int
    active_parameters: int

    @property
    def shape(self) -> Shape:
        """Widths and ranks."""
        return Shape(self.in_features, self.out_features, self.ranks)


@dataclass(frozen=True)
class Plan:
    """All sites of a model under a method, in the model's order.

    `notes`: remarks a user should read before training. `kernels`: which kernels compute the sites, and why.
    """

    sites: tuple[Site, ...]
    notes: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Trainable numbers of all sites."""
        return sum(site.parameters for site in self.sites)

    @property
    def active_parameters(self) -> int:
        """Numbers of all sites that one token is computed with."""
        return sum(site.active_parameters for site in self.sites)

    def rows(self, full: bool = False) -> list[dict[str, Any]]:
        """The table as plain data; sites that differ only in their layer share a row unless `full`."""
        groups: dict[tuple[Any, ...], list[Site]] = {}
        for site in self.sites:
            key = (site.path,) if full else (re.sub(r"\.\d+\.", ".*.", site.path, count=1), _alike(site))
            groups.setdefault(key, []).append(site)
        return [_row(sites) for sites in groups.values()]

    def table(self, full: bool = False) -> Table:
        """The table for a terminal; what all rows have in common stands above and below it."""
        rows = self.rows(full)
        prefix = common_prefix([row["path"] for row in rows])
        routers = sorted({row["router"] for row in rows})
        # kernels never stand in the table, routers only where they differ
        below = {"kernel": self.kernels, **({"router": routers} if len(routers) == 1 else {})}
        rows = [{column: value for column, value in row.items() if column not in below} for row in rows]
        title = f"{len(self.sites)} sites" + (f" in {prefix}" if prefix else "")
        table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column in rows[0]:
            justify: Literal["left", "right"] = "left" if column in ("path", "router") else "right"
            table.add_column(
                column.replace("_parameters", ""), justify=justify, no_wrap=column != "path", overflow="fold"
            )
        for row in rows:
            row["path"] = row["path"].removeprefix(prefix + ".")
            table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
        counts = f"trainable {self.parameters:,}, active {self.active_parameters:,} parameters"
        said = [f"{name}: {', '.join(values)}" for name, values in below.items()]
        table.caption = "; ".join([counts, *said])
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        console = Console(file=text, width=140)
        console.print(self.table(), *(f"note: {note}" for note in self.notes), sep="\n")
        return text.getvalue().rstrip()

    def to_list(self) -> list[dict[str, Any]]:
        """Plain data for `adapter_config.json`."""
        return [{**asdict(site), "ranks": list(site.ranks)} for site in self.sites]

    def check_against(self, stored: Iterable[dict[str, Any]]) -> None:
        """Compare with the plan an adapter was trained under; every difference in one `CheckpointError`."""
        try:
            old = {record["path"]: Site(**{**record, "ranks": tuple(record["ranks"])}) for record in stored}
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"the adapter's stored plan is damaged: {error}") from None
        new = {site.path: site for site in self.sites}
        problems = [f"{path}: missing in this model" for path in old if path not in new]
        problems += [f"{path}: not in the adapter's plan" for path in new if path not in old]
        for path in old.keys() & new.keys():
            # the kernel is how a site is computed, not what
            pairs = [(f.name, getattr(old[path], f.name), getattr(new[path], f.name)) for f in fields(Site)]
            problems += [
                f"{path}.{name}: adapter {was!r}, model {now!r}"
                for name, was, now in pairs
                if was != now and name != "kernel"
            ]
        if problems:
            shown = "\n  ".join(sorted(problems)[:20])
            raise CheckpointError(
                f"the adapter was trained under another plan, {len(problems)} differences:\n  {shown}"
            )


def common_prefix(paths: list[str]) -> str:
    """The leading segments that all paths share, before the first layer number."""
    shared = []
    for segments in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(segments)) > 1 or not segments[0].isidentifier():
            break
        shared.append(segments[0])
    return ".".join(shared)


def _alike(site: Site) -> Site:
    """The site without what differs from layer to layer."""
    return replace(site, path="", leader=None if site.leader is None else "shared")


def _row(sites: list[Site]) -> dict[str, Any]:
    first, layers = sites[0], [int(n[1:-1]) for s in sites for n in re.findall(r"\.\d+\.", s.path)[:1]]
    path = first.path
    if len(sites) > 1:
        is_run = layers == list(range(layers[0], layers[-1] + 1))
        label = f"{layers[0]}-{layers[-1]}" if is_run else ",".join(map(str, layers))
        path = re.sub(r"\.\d+\.", f".{{{label}}}.", path, count=1)
    low, high = min(first.ranks), max(first.ranks)
    return {
        "path": path,
        "shape": f"{first.in_features} x {first.out_features}",
        "experts": first.num_experts,
        "rank": str(high) if low == high else f"{low}-{high}",
        "top_k": first.top_k,
        "router": first.router if first.leader is None else f"{first.router} (shared)",
        "kernel": first.kernel,
        "parameters": sum(site.parameters for site in sites),
        "active_parameters": sum(site.active_parameters for site in sites),
    }


def make_plan(model: nn.Module, method: Method, is_stored: bool = False) -> Plan:
    """The plan of `method` on `model`, which may stand on the meta device; `ConfigError` where the two do not fit.

    `is_stored`: the adapter exists already, and a kernel that cannot serve this model is no mistake.
    """
    places = places_of(model)
    rule_of = assign_rules(model, method, places)
    leaders: dict[tuple[str, ...], str] = {}
    rules = settle_rules(rule_of, method)
    choice = Choice.on(model, is_stored)
    sites = [_make_site(place, *rules[place.path], leaders, choice) for place in places if place.path in rules]
    _check_losses(sites, method)
    kernels = choice.explain([_served(site, method.rules[site.rule]) for site in sites])
    return Plan(tuple(sites), tuple(_notes(sites, method)), kernels)


def _make_site(
    linear: Linear, name: str, rule: Rule, ranks: tuple[int, ...], leaders: dict[tuple[str, ...], str], choice: Choice
) -> Site:
    router, expert = ROUTERS[rule.router.kind](rule.router), EXPERTS[rule.expert.kind](rule.expert)
    objection = router.objection(linear.is_causal, expert)
    if objection:
        raise ConfigError(f"rules.{name}.router.{objection}")
    if (expert.one_rank or router.draws) and len(set(ranks)) > 1:
        raise ConfigError(
            f"rules.{name}: {rule.expert.kind!r} experts under router {rule.router.kind!r} have one rank, but an "
            f"allocation gives {linear.path} the ranks {list(ranks)}; valid: no budget, or other parts"
        )
    shape = Shape(linear.in_features, linear.out_features, ranks)
    leader = None
    if getattr(rule.router, "share_router", False) and linear.siblings_key is not None:
        first = leaders.setdefault((name, *linear.siblings_key), linear.path)
        leader = None if first == linear.path else first
    in_experts = _count(kept_shapes(expert, router, shape))
    in_router = 0 if leader else _count(router.parameter_shapes(linear.in_features))
    return Site(
        path=linear.path,
        rule=name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        expert=rule.expert.kind,
        ranks=shape.ranks,
        router=rule.router.kind,
        num_experts=router.num_experts,
        top_k=router.top_k,
        kernel=choice.settle(rule.kernel, router.at_once(shape), router.top_k, f"rules.{name}.kernel, {linear.path}"),
        scale=expert.scale(shape),
        stream=linear.stream,
        leader=leader,
        parameters=in_experts + in_router,
        active_parameters=_count_active(expert, shape, router.top_k) + in_router,
    )


def _served(site: Site, rule: Rule) -> Served:
    ranks = site.ranks[:1] if ROUTERS[site.router].draws else site.ranks
    return Served(site.kernel, replace(site.shape, ranks=ranks), site.top_k, is_named=rule.kernel == site.kernel)


def _count_active(expert: Expert, shape: Shape, top_k: int) -> int:
    """What a site of `top_k` experts would hold, the mean over neighbours in a circle where ranks differ."""
    circle = shape.ranks * 2
    chosen = [replace(shape, ranks=circle[first : first + top_k]) for first in range(len(shape.ranks))]
    return sum(_count(expert.parameter_shapes(few)) for few in chosen) // len(chosen)


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _notes(sites: list[Site], method: Method) -> Iterable[str]:
    for name, rule in method.rules.items():
        chooses_one = any(site.top_k == 1 < site.num_experts for site in sites if site.rule == name)
        if getattr(rule.router, "renormalise", False) and chooses_one:
            yield f"rules.{name}: with top_k 1 and renormalised weights the task gives the router no gradient"


def parts_of(site: Site, method: Method, plan: Plan, leader: Mixture | None) -> Parts:
    """The running parts of one site."""
    rule = method.rules[site.rule]
    # a router whose top_k is one number reads it as it stands: null experts may raise it above the experts' number
    numbers = {"num_experts": site.num_experts, **({"top_k": site.top_k} if varies(rule.router, "top_k") else {})}
    router = ROUTERS[site.router](fix(rule.router, **numbers))
    shape = router.at_once(site.shape)
    in_force = [(name, LOSSES[name](config), config.coefficient) for name, config in _losses_in_force(method)]
    routed = sum(_is_routed(other) for other in plan.sites)
    return Parts(
        expert=EXPERTS[site.expert](fix(rule.expert, rank=max(site.ranks))),
        router=router,
        kernel=KERNELS[site.kernel](shape.ranks),
        shape=shape,
        stream=site.stream,
        losses=[(n, loss, c / routed) for n, loss, c in in_force if isinstance(loss, SiteLoss) and _is_routed(site)],
        pass_losses=[(n, loss, c) for n, loss, c in in_force if isinstance(loss, PassLoss) and router.draws],
        leader=[leader] if leader else [],
    )


def _is_routed(site: Site) -> bool:
    """Whether the site has a router of its own that decides by the token."""
    return site.leader is None and not ROUTERS[site.router].is_static


def _losses_in_force(method: Method) -> list[tuple[str, Any]]:
    configs = [(name, getattr(method.losses, name)) for name in LOSSES]
    return [(name, config) for name, config in configs if config.coefficient > 0]


def _check_losses(sites: list[Site], method: Method) -> None:
    """`ConfigError` for a loss that no site can feel."""
    for name, _ in _losses_in_force(method):
        if issubclass(LOSSES[name], PassLoss):
            felt, valid = any(ROUTERS[site.router].draws for site in sites), "a router that draws, such as 'uniform'"
        else:
            felt, valid = any(_is_routed(site) for site in sites), "a router that decides by the token"
        if not felt:
            raise ConfigError(f"losses.{name}: has no effect without {valid}; valid: coefficient 0")
