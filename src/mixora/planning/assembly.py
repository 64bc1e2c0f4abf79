"""Rules x model -> plan, and plan -> the parts that run: where all choices of a method meet."""

import math
from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from mixora.contracts import Expert, PassLoss, Router, Shape, SiteLoss, kept_shapes
from mixora.depth import fix, varies
from mixora.errors import ConfigError
from mixora.experts import EXPERTS
from mixora.kernels import KERNELS
from mixora.kernels.choice import Choice, Served
from mixora.losses import LOSSES
from mixora.mixture import Mixture
from mixora.mixture.parts import Parts
from mixora.planning.assignment import assign_rules, settle_rules
from mixora.planning.feed_forward import Role, check_rules, find_roles
from mixora.planning.method import Method, Rule
from mixora.planning.plan import Plan, Site
from mixora.planning.sites import Linear, find_fused_experts, places_of
from mixora.routers import ROUTERS

# each costs some work in a plan, and where routers draw, tensors of its own
MOST_EXPERTS = 4096


def make_plan(model: nn.Module, method: Method, whole: Collection[str] = (), is_stored: bool = False) -> Plan:
    """The plan of `method` on `model`, which may stand on the meta device; `ConfigError` where the two do not fit.

    `whole`: names of modules that are trained whole, in which there are no sites.
    `is_stored`: the adapter exists already, and a kernel that cannot serve this model is no mistake.
    """
    places = places_of(model)
    rule_of = assign_rules(model, method, places, whole)
    leaders: dict[tuple[str | int, ...], str] = {}
    rules = settle_rules(rule_of, method)
    roles = find_roles(places, rule_of, method)
    check_rules(roles, rules)
    choice = Choice.on(model, is_stored)
    sites = [_make_site(p, *rules[p.path], leaders, roles.get(p.path), choice) for p in places if p.path in rules]
    _check_losses(sites, method)
    kernels = choice.explain([_served(site, method.rules[site.rule]) for site in sites])
    return Plan(tuple(sites), tuple(_notes(model, sites, method)), kernels)


def _make_site(
    linear: Linear,
    name: str,
    rule: Rule,
    ranks: tuple[int, ...],
    leaders: dict[tuple[str | int, ...], str],
    role: Role | None,
    choice: Choice,
) -> Site:
    router, expert = ROUTERS[rule.router.kind](rule.router), EXPERTS[rule.expert.kind](rule.expert)
    _check_site(linear, name, rule, expert, router, ranks)
    shape = Shape(linear.in_features, linear.out_features, ranks)
    leader = _find_leader(linear, name, rule, leaders, role)
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
        kernel=choice.settle(
            rule.kernel,
            router.at_once(shape),
            1 if role else router.top_k,
            f"rules.{name}.kernel, {linear.path}",
            joins=expert.joins and router.joins,
        ),
        scale=expert.scale(shape),
        stream=linear.stream,
        leader=leader,
        parameters=in_experts + in_router,
        active_parameters=_count_active(expert, shape, router.top_k) + in_router,
        role=None if role is None else "last" if role.is_last else "first",
    )


def _check_site(linear: Linear, name: str, rule: Rule, expert: Expert, router: Router, ranks: tuple[int, ...]) -> None:
    """`ConfigError` for parts that do not go together at this place, or too many of them."""
    if router.num_experts > MOST_EXPERTS:
        raise ConfigError(f"rules.{name}.router.num_experts: got {router.num_experts}; valid: 1 to {MOST_EXPERTS}")
    objection = router.objection(linear.is_causal, expert)
    if objection:
        raise ConfigError(f"rules.{name}.router.{objection}")
    if rule.one_rank and len(set(ranks)) > 1:
        raise ConfigError(
            f"rules.{name}: {rule.expert.kind!r} experts under router {rule.router.kind!r} have one rank, but an "
            f"allocation gives {linear.path} the ranks {list(ranks)}; valid: one rank for each site, or other parts"
        )


def _find_leader(
    linear: Linear, name: str, rule: Rule, leaders: dict[tuple[str | int, ...], str], role: Role | None
) -> str | None:
    """The path of the site whose router this one uses; `leaders` remembers the first of each kin."""
    first = role.leader if role else linear.path
    if getattr(rule.router, "share_router", False) and linear.siblings_key is not None:
        first = leaders.setdefault((name, *linear.siblings_key), linear.path)
    return None if first == linear.path else first


def _served(site: Site, rule: Rule) -> Served:
    ranks = site.ranks[:1] if ROUTERS[site.router].draws else site.ranks
    top_k = 1 if site.role else site.top_k
    return Served(site.kernel, replace(site.shape, ranks=ranks), top_k, is_named=rule.kernel == site.kernel)


def _count_active(expert: Expert, shape: Shape, top_k: int) -> int:
    """What a site of `top_k` experts would hold, the mean over neighbours in a circle where ranks differ."""
    circle = shape.ranks * 2
    starts = range(len(shape.ranks) if len(set(shape.ranks)) > 1 else 1)
    chosen = [replace(shape, ranks=circle[first : first + top_k]) for first in starts]
    return sum(_count(expert.parameter_shapes(few)) for few in chosen) // len(chosen)


def _count(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def _notes(model: nn.Module, sites: list[Site], method: Method) -> Iterable[str]:
    for name, rule in method.rules.items():
        chooses_one = any(site.top_k == 1 < site.num_experts for site in sites if site.rule == name)
        if getattr(rule.router, "renormalise", False) and chooses_one:
            yield f"rules.{name}: with top_k 1 and renormalised weights the task gives the router no gradient"
        fused = find_fused_experts(model)
        if fused and "all-linear" in ((rule.targets,) if isinstance(rule.targets, str) else rule.targets):
            yield f"rules.{name}: all-linear leaves out the model's own experts, which are no linear modules: {fused}"


def _part_of(site: Site) -> str | None:
    """What the sites of one feed-forward part have in common; None for others."""
    return None if site.role is None else site.leader or site.path


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
        firsts=frozenset(s.path for s in plan.sites if s.role == "first" and _part_of(s) == _part_of(site)),
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
