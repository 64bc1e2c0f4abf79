"""From an allocator's weights to experts and ranks for each site, under the budget."""

from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction

from torch import Tensor, nn

from mixora.allocators import ALLOCATORS
from mixora.allocators.budget import apportion, spread
from mixora.contracts import Allocator, Candidate, Evidence
from mixora.depth import MOST
from mixora.display.stages import Advance
from mixora.errors import ConfigError
from mixora.planning.assembly import make_plan
from mixora.planning.method import Method
from mixora.planning.plan import Plan, Site
from mixora.planning.sites import frozen_modules

Batches = Iterable[Mapping[str, Tensor]]
Ranks = dict[str, tuple[int, ...]]


def is_settled(model: nn.Module, method: Method, whole: Collection[str]) -> bool:
    """Whether there is nothing to allocate; `ConfigError` for an allocation that was made for another model."""
    if method.allocation is None:
        return method.allocator.kind == "groups" and method.allocator.budget is None
    sites = {site.path for site in make_plan(model, method, whole).sites}
    strays = sorted(sites ^ method.allocation.keys())
    if strays:
        raise ConfigError(
            f"allocation: was made for another model or other targets, {len(strays)} sites differ, the first is "
            f"{strays[0]}; valid: null, to allocate anew"
        )
    return True


def choose_ranks(
    model: nn.Module, method: Method, whole: Collection[str], batches: Batches | None, progress: Advance | None
) -> Ranks:
    """The ranks of each site's experts, by path, in the order of the model."""
    allocator = ALLOCATORS[method.allocator.kind](method.allocator)

    def plan_with(allocation: Ranks | None) -> Plan:
        return make_plan(model, method.model_copy(update={"allocation": allocation}), whole)

    given = plan_with(None)
    modules = dict(frozen_modules(model))
    candidates = [Candidate(site.path, modules[site.path], site.ranks) for site in given.sites]
    weights = allocator.weigh(candidates, Evidence(model, batches, progress or (lambda done, total: None)))
    ones = {path: (1,) * count for path, count in _count_experts(given, weights, allocator).items()}
    least = plan_with(ones)
    # the ranks that a site's experts get at once
    steps = [site.num_experts if method.rules[site.rule].one_rank else 1 for site in least.sites]
    more = plan_with(
        {
            site.path: (2,) * step + (1,) * (site.num_experts - step)
            for site, step in zip(least.sites, steps, strict=True)
        }
    )
    counts = _divide(given, least, more, steps, weights, method)
    totals = [count * step for count, step in zip(counts, steps, strict=True)]
    found = {site.path: spread(total, site.num_experts) for site, total in zip(least.sites, totals, strict=True)}
    path, ranks = max(found.items(), key=lambda item: item[1])
    if ranks[0] > MOST:
        raise ConfigError(f"allocator.budget: gives {path} experts of rank {ranks[0]}; valid: at most {MOST}")
    return found


def _count_experts(given: Plan, weights: list[float], allocator: Allocator) -> dict[str, int]:
    """Experts of each site: as the rules have them, or as many in all, in proportion to weight^expert_power.

    Sites that share a router have one number of experts, and no site has fewer than a token is computed by.
    """
    counts = {site.path: site.num_experts for site in given.sites}
    if allocator.expert_power == 0:
        return counts
    groups: dict[str, list[tuple[Site, float]]] = {}
    for site, weight in zip(given.sites, weights, strict=True):
        groups.setdefault(site.leader or site.path, []).append((site, weight))
    for rule in {site.rule: None for site in given.sites}:
        leaders = [site for site in given.sites if site.rule == rule and site.leader is None and site.num_experts > 1]
        means = [sum(weight for _, weight in groups[s.path]) / len(groups[s.path]) for s in leaders]
        shares = [max(mean, 1e-300) ** allocator.expert_power for mean in means]
        total = sum(site.num_experts for site in leaders)
        found = apportion(shares, [site.top_k for site in leaders], [Fraction(1)] * len(leaders), total)
        assert found is not None
        for leader, count in zip(leaders, found, strict=True):
            counts.update({site.path: count for site, _ in groups[leader.path]})
    return counts


def _divide(given: Plan, least: Plan, more: Plan, steps: list[int], weights: list[float], method: Method) -> list[int]:
    """How many steps each site gets. `least`: the plan in which every rank is 1; `more`: with a step more at each site.

    A step is a number of ranks, which the weights of the sites are for one by one.
    """
    is_active = method.allocator.budget_of == "active"
    budget = method.allocator.budget or (given.active_parameters if is_active else given.parameters)
    grown = zip(least.sites, more.sites, steps, strict=True)
    prices = [_price(site, larger, step, is_active) for site, larger, step in grown]
    fewest = [site.num_experts // step for site, step in zip(least.sites, steps, strict=True)]
    smallest = least.active_parameters if is_active else least.parameters
    # what does not grow with the ranks: routers
    fixed = smallest - sum(int(count * price) for count, price in zip(fewest, prices, strict=True))
    shares = [weight / step for weight, step in zip(weights, steps, strict=True)]
    counts = apportion(shares, fewest, prices, budget - fixed)
    if counts is None:
        raise ConfigError(
            f"allocator.budget: got {budget}; valid for these sites: at least {smallest} "
            f"{method.allocator.budget_of} parameters, which is one rank for each expert, and the routers"
        )
    return counts


def _price(site: Site, larger: Site, step: int, is_active: bool) -> Fraction:
    """Parameters of a step, by which a site gets `larger`; of one rank of one expert those active on average."""
    if is_active and step == site.num_experts:
        return Fraction(larger.active_parameters - site.active_parameters)
    price = Fraction(larger.parameters - site.parameters)
    return price * site.top_k / site.num_experts if is_active else price
