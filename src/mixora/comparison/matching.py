"""Settings with which methods have equally many parameters, found by counting plans on a model without weights."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

from torch import nn

from mixora.allocators.groups import GroupsConfig
from mixora.comparison.settings import Match, MethodEntry, Setup
from mixora.depth import is_line
from mixora.errors import ConfigError
from mixora.planning.method import Method
from mixora.planning.plan import Plan
from mixora.training.run_config import AdapterSection
from mixora.tuner import plan

Changes = dict[str, Any]
# no search goes on beyond these: ranks wider than any model, more experts than anybody plans
MOST = {"rank": 1 << 16, "num_experts": 1 << 10}


@dataclass(frozen=True)
class Matched:
    """A method as it is run. `chosen`: what was set, in words; the counts are those of the adapter alone."""

    method: str
    adapter: AdapterSection
    chosen: str
    trainable: int
    active: int


def match_methods(model: nn.Module, setup: Setup) -> dict[str, Matched]:
    """How each method is run on `model`, by name; weights are not looked at.

    Raises one `ConfigError` for all methods that cannot have as many parameters as the reference, with what they can.
    """
    as_given = {method.name: _describe_as_given(model, method) for method in setup.methods}
    if setup.match is None:
        return as_given
    match, reference = setup.match, as_given[setup.reference]
    found, problems = {}, []
    for method in setup.methods:
        options = _options(model, method, as_given[method.name], reference, match)
        best = min(options, key=lambda option: abs(_excess(option, reference, match)))
        if abs(_excess(best, reference, match)) <= match.tolerance:
            found[method.name] = best
        else:
            problems.append(_tell(options, reference, match))
    if problems:
        raise ConfigError(
            f"match: {reference.method} has {_count(reference, match):,} {match.parameters} parameters, and within "
            f"{match.tolerance:.1%} of that\n  " + "\n  ".join(problems) + "\n"
            "valid: a larger match.tolerance, another size of the reference, or other settings of these methods, "
            "such as num_experts"
        )
    return found


def _count(matched: Matched, match: Match) -> int:
    return matched.trainable if match.parameters == "trainable" else matched.active


def _excess(option: Matched, reference: Matched, match: Match) -> float:
    return _count(option, match) / _count(reference, match) - 1


def _tell(options: list[Matched], reference: Matched, match: Match) -> str:
    reached = {f"{o.chosen}: {_count(o, match):,} ({_excess(o, reference, match):+.1%})": None for o in options}
    return f"{options[0].method} cannot be; it reaches {', '.join(reached)}"


def _options(
    model: nn.Module, method: MethodEntry, as_given: Matched, reference: Matched, match: Match
) -> list[Matched]:
    """What was tried, up to the first way that comes near enough; the simplest ways are tried first."""
    found = [as_given]
    for way in _ways(method):
        if any(abs(_excess(option, reference, match)) <= match.tolerance for option in found):
            break
        found += way(model, method, _count(reference, match), match)
    return found


Way = Callable[[nn.Module, MethodEntry, int, Match], list[Matched]]


def _ways(method: MethodEntry) -> tuple[Way, ...]:
    if method.vary == "num_experts":
        return (_by_experts,)
    built = method.adapter().build().method
    if built.allocator.kind != "groups" or built.allocator.budget is not None:
        return (_by_budget,)
    # a budget may give each site another rank; of experts of one rank, it is simpler to say by layers
    is_even = any(rule.one_rank for rule in built.rules.values())
    return (_by_rank, _by_depth, _by_budget) if is_even else (_by_rank, _by_budget, _by_depth)


def _by_rank(model: nn.Module, method: MethodEntry, target: int, match: Match) -> list[Matched]:
    """Whole ranks, in the proportions that the method gives them."""
    rules = method.adapter().build().method.rules
    top = max(_largest(rule.expert.rank) for rule in rules.values())

    def describe(rank: int) -> Matched | None:
        changes = _keep_scale(rules, rank / top)
        for name, rule in rules.items():
            changes[f"rules.{name}.expert.rank"] = _scale(rule.expert.rank, rank, top)
        words = " and ".join(dict.fromkeys(_write(value) for key, value in changes.items() if key.endswith(".rank")))
        return _try(model, method, changes, f"rank {words}")

    return _nearest(describe, target, match, MOST["rank"])


def _by_experts(model: nn.Module, method: MethodEntry, target: int, match: Match) -> list[Matched]:
    """Numbers of experts, in the proportions that the method gives them."""
    rules = method.adapter().build().method.rules
    given = {name: getattr(rule.router, "num_experts", None) for name, rule in rules.items()}
    given = {name: number for name, number in given.items() if number is not None}
    if not given:
        raise ConfigError(f"methods: {method.name}: vary: got 'num_experts', but it has one expert; valid: 'rank'")
    top = max(map(_largest, given.values()))

    def describe(experts: int) -> Matched | None:
        changes = {f"rules.{name}.router.num_experts": _scale(number, experts, top) for name, number in given.items()}
        words = " and ".join(dict.fromkeys(map(_write, changes.values())))
        return _try(model, method, changes, f"{words} experts")

    return _nearest(describe, target, match, MOST["num_experts"])


def _by_budget(model: nn.Module, method: MethodEntry, target: int, match: Match) -> list[Matched]:
    """The method's allocator meets the count itself, by experts or sites of unequal rank."""
    rules = method.adapter().build().method.rules
    if any(_alpha_of(rule) is not None and not isinstance(rule.expert.rank, int) for rule in rules.values()):
        # each layer has a factor of its own, which would change with whatever rank the allocator gives it
        return []
    changes = _keep_scale(rules)
    changes |= {"allocator.budget": target, "allocator.budget_of": match.parameters}
    option = _try(model, method, changes, f"budget {target:,}")
    return [] if option is None else [option]


def _by_depth(model: nn.Module, method: MethodEntry, target: int, match: Match) -> list[Matched]:
    """Two neighbouring ranks, evenly mixed over the layers."""
    rules = method.adapter().build().method.rules
    layers = getattr(model.config, "num_hidden_layers", 1)
    if not all(isinstance(rule.expert.rank, int) for rule in rules.values()):
        return []
    top = max(rule.expert.rank for rule in rules.values())

    def describe(total: int) -> Matched | None:
        changes = _keep_scale(rules)
        for name, rule in rules.items():
            steps = [total * rule.expert.rank * layer // (top * layers) for layer in range(layers + 1)]
            ranks = [max(1, high - low) for low, high in pairwise(steps)]
            changes[f"rules.{name}.expert.rank"] = ranks
        ranks = [rank for key, value in changes.items() if key.endswith(".rank") for rank in value]
        mixed = f"-{max(ranks)} over the layers" if max(ranks) > min(ranks) else ""
        return _try(model, method, changes, f"rank {min(ranks)}{mixed}")

    return _nearest(describe, target, match, MOST["rank"] * layers, least=layers)


def _keep_scale(rules: Mapping[str, Any], growth: float = 1.0) -> Changes:
    """Another rank changes the size of a method, not the factor in front of its experts.

    Where ranks vary over depth and grow by `growth`, the factors stay by an alpha that grows alike.
    """
    changes: Changes = {}
    for name, rule in rules.items():
        alpha, at = _alpha_of(rule), f"rules.{name}.expert"
        if alpha is not None and isinstance(rule.expert.rank, int):
            changes |= {f"{at}.alpha": None, f"{at}.scale": alpha / rule.expert.rank}
        elif alpha is not None:
            changes[f"{at}.alpha"] = alpha * growth
    return changes


def _alpha_of(rule: Any) -> float | None:
    return getattr(rule.expert, "alpha", None)


def _nearest(
    describe: Callable[[int], Matched | None], target: int, match: Match, most: int, least: int = 1
) -> list[Matched]:
    """The two settings between which `target` lies, or the one at the end of what is possible.

    `describe` counts more for larger numbers, and gives None for numbers that are too small.
    """
    known = cache(describe)

    def reaches(number: int) -> bool:
        option = known(number)
        return option is not None and _count(option, match) >= target

    low = high = least
    while not reaches(high) and high < most:
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return [option for option in (known(low), known(high)) if option is not None]


def _try(model: nn.Module, method: MethodEntry, changes: Changes, chosen: str) -> Matched | None:
    """The method with `changes`; None where these are impossible."""
    try:
        return _describe(model, method, changes, chosen)
    except ConfigError:
        return None


def _describe_as_given(model: nn.Module, method: MethodEntry) -> Matched:
    try:
        return _describe(model, method, {}, "as given")
    except ConfigError as error:
        raise ConfigError(f"methods: {method.name}: {error}") from None


def _describe(model: nn.Module, method: MethodEntry, changes: Changes, chosen: str) -> Matched:
    adapter = method.adapter(**changes)
    table = _plan_without_weights(model, adapter)
    return Matched(method.name, adapter, chosen, table.parameters, table.active_parameters)


def _plan_without_weights(model: nn.Module, adapter: AdapterSection) -> Plan:
    """The plan; an allocator that looks at weights or data meets the same budget as one that does not."""
    config = copy.copy(adapter.build())
    given = config.method.allocator
    groups = GroupsConfig(budget=given.budget, budget_of=given.budget_of)
    config.method = Method.model_copy(config.method, update={"allocator": groups})
    return plan(model, config)


def _largest(value: Any) -> int:
    return max(_numbers(value))


def _numbers(value: Any) -> Iterator[int]:
    """The numbers of a setting that may vary over depth."""
    yield from [value] if isinstance(value, int) else value.values() if is_line(value) else value


def _scale(value: Any, number: int, top: int) -> Any:
    """`value` times number / top, rounded half up and not below 1; a line and a list keep their form."""
    if isinstance(value, int):
        return max(1, (2 * value * number + top) // (2 * top))
    if is_line(value):
        return {end: _scale(part, number, top) for end, part in value.items()}
    return [_scale(part, number, top) for part in value]


def _write(value: Any) -> str:
    return "-".join(dict.fromkeys(map(str, _numbers(value))))
