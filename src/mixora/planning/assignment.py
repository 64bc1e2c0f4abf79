"""Which rule each place of a model gets, and with which numbers at its depth."""

from collections.abc import Collection

from torch import nn

from mixora.depth import depths_of, fix, settle
from mixora.errors import ConfigError
from mixora.experts import EXPERTS
from mixora.planning.method import Method, Rule
from mixora.planning.sites import GROUPS, WHOLE, Block, Linear, check_block, match, names_by_group
from mixora.routers import ROUTERS


def assign_rules(model: nn.Module, method: Method, places: list[Linear], whole: Collection[str] = ()) -> dict[str, str]:
    """The rule of each adapted module, by path; none of them lies in a module that `whole` names."""
    linears = [place for place in places if not isinstance(place, Block)]
    if not linears:
        raise ConfigError(f"{type(model).__name__} has no linear modules to adapt")
    rule_of: dict[str, str] = {}
    # rules for whole modules first: where one takes a linear, a group of another rule makes way
    for name, rule in sorted(method.rules.items(), key=lambda item: not _is_serial(item[1])):
        where, serial = f"rules.{name}.targets", _is_serial(rule)
        groups = (*GROUPS, WHOLE) if serial else GROUPS
        for place in match(rule.targets, places if serial else linears, model, where, groups, whole):
            if isinstance(place, Block):
                check_block(model, place.path, where)
            taken_by = rule_of.setdefault(place.path, name)
            makes_way = _is_serial(method.rules[taken_by]) and not serial and names_by_group(rule.targets, place)
            if taken_by != name and not makes_way:
                raise ConfigError(f"{where}: {place.path} is already taken by rule {taken_by!r}")
    return rule_of


def _is_serial(rule: Rule) -> bool:
    return EXPERTS[rule.expert.kind].reads == "output"


def settle_rules(rule_of: dict[str, str], method: Method) -> dict[str, tuple[str, Rule, tuple[int, ...]]]:
    """For each site, by path: the name of its rule, the rule with numbers for its depth, and its ranks."""
    settled = {}
    for name, rule in method.rules.items():
        paths = [path for path, owner in rule_of.items() if owner == name]
        for path, depth in depths_of(paths).items():
            expert = settle(rule.expert, depth, f"rules.{name}.expert")
            router = settle(rule.router, depth, f"rules.{name}.router")
            ranks = (method.allocation or {}).get(path)
            if ranks is None:
                ranks = (expert.rank,) * ROUTERS[router.kind](router).num_experts
            fixed = {"expert": expert, "router": fix(router, num_experts=len(ranks))}
            settled[path] = (name, rule.model_copy(update=fixed), ranks)
    return settled
