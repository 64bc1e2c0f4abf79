"""The feed-forward parts of a model, for experts that go through all of one: its first linears, and its last."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mixora.errors import ConfigError
from mixora.experts import EXPERTS
from mixora.planning.method import Method, Rule
from mixora.planning.sites import Block, Linear
from mixora.routers import ROUTERS


@dataclass(frozen=True)
class Role:
    """`leader`: the part's first linear, whose router serves all. `is_last`: this linear gives what the part gives."""

    leader: str
    is_last: bool


def find_roles(places: list[Linear], rule_of: Mapping[str, str], method: Method) -> dict[str, Role]:
    """The role of each linear, by path, whose rule has experts that span a feed-forward part.

    `ConfigError` where such a rule takes something else, or not all linears of a part.
    """
    linears = [place for place in places if not isinstance(place, Block)]
    blocks: dict[str, list[Linear]] = {}
    for linear in linears:
        if linear.group == "feed-forward":
            blocks.setdefault(_block_of(linear), []).append(linear)
    roles: dict[str, Role] = {}
    for name, rule in method.rules.items():
        if EXPERTS[rule.expert.kind].spans_ffn:
            mine = [linear for linear in linears if rule_of.get(linear.path) == name]
            roles |= _find_roles_of_rule(mine, blocks, f"rules.{name}.targets", rule.expert.kind)
    return roles


def _find_roles_of_rule(mine: list[Linear], blocks: dict[str, list[Linear]], where: str, kind: str) -> dict[str, Role]:
    outside = [linear.path for linear in mine if linear.group != "feed-forward"]
    if outside:
        raise ConfigError(
            f"{where}: {outside[0]} belongs to no feed-forward part of a repeated block, which experts of kind "
            f"{kind!r} go through; valid: [feed-forward]"
        )
    roles: dict[str, Role] = {}
    for block in dict.fromkeys(map(_block_of, mine)):
        missing = [linear.path for linear in blocks[block] if linear not in mine]
        if missing:
            raise ConfigError(
                f"{where}: experts of kind {kind!r} go through a whole feed-forward part, but the rule leaves out "
                f"{', '.join(missing)}; valid: all of them, as [feed-forward] does"
            )
        roles |= _read_part(blocks[block], block, where)
    return roles


def _block_of(linear: Linear) -> str:
    """The path up to the last number."""
    found = re.match(r".*\.\d+(?=\.)", linear.path)
    assert found is not None
    return found[0]


def _read_part(linears: list[Linear], block: str, where: str) -> dict[str, Role]:
    """The roles by the widths: all linears read what the first one reads, but the last one, which gives it back."""
    first, *rest = linears
    # one linear may give both halves of a gated part
    inner = (first.out_features, first.out_features // 2)
    backs = [linear for linear in rest if linear.out_features == first.in_features and linear.in_features in inner]
    widths = (first.in_features, first.out_features)
    if not backs or any((o.in_features, o.out_features) != widths for o in rest if o is not backs[-1]):
        found = ", ".join(f"{o.path.removeprefix(block + '.')} {o.in_features} x {o.out_features}" for o in linears)
        raise ConfigError(
            f"{where}: {block} has no feed-forward part that experts can go through: {found}; valid: linears that "
            "read the block's width, and one that gives it back"
        )
    return {linear.path: Role(first.path, is_last=linear is backs[-1]) for linear in linears}


def check_rules(roles: Mapping[str, Role], rules: Mapping[str, tuple[str, Rule, tuple[int, ...]]]) -> None:
    """`ConfigError` where a rule's router cannot serve a feed-forward part, or the part's linears differ in experts.

    `rules`: of each site, by path, the name of its rule, the rule, and its ranks.
    """
    for path, role in roles.items():
        name, rule, ranks = rules[path]
        experts, of_leader = len(ranks), len(rules[role.leader][2])
        if experts != of_leader:
            raise ConfigError(
                f"allocation: gives {path} {experts} experts, where the first linear of its feed-forward part has "
                f"{of_leader}; valid: one number in each part"
            )
        if getattr(rule.router, "share_router", False):
            raise ConfigError(
                f"rules.{name}.router.share_router: got true, but experts of kind {rule.expert.kind!r} have one "
                "router for a whole feed-forward part as it is; valid: false"
            )
        if not ROUTERS[rule.router.kind](rule.router).sums_to_one:
            raise ConfigError(
                f"rules.{name}.router: got a {rule.router.kind!r} router whose weights need not sum to 1, but experts "
                f"of kind {rule.expert.kind!r} hold the frozen linears, which the weights would scale; valid: 'topk' "
                "with renormalise and without capacity_factor, 'soft', 'threshold', 'null_topk'"
            )
