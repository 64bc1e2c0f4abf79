"""Which linears are a feed-forward part, and every rule that cannot have one, in words."""

import pytest
from torch import nn

import mixora
from mixora.errors import ConfigError
from mixora.kernels.choice import Choice
from tests.models import tiny_llama
from tests.parts import Part, ffn_only, mixlora


class Odd(nn.Module):
    """Blocks whose linears are no feed-forward part."""

    def __init__(self, *sizes):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(*size) for size in sizes])])


MISTAKES = [
    (
        tiny_llama,
        {"rules.ffn.targets": ["up_proj", "down_proj"]},
        r"leaves out model\.layers\.0\.mlp\.gate_proj; valid: ",
    ),
    (tiny_llama, {"rules.ffn.targets": r".*\.1\.mlp\.(gate|up)_proj"}, r"leaves out model\.layers\.1\.mlp\.down_proj"),
    (tiny_llama, {"rules.ffn.targets": ["lm_head"]}, r"rules\.ffn\.targets: lm_head belongs to no feed-forward part"),
    (
        tiny_llama,
        {"rules.ffn.targets": ["all-linear"], "rules.attention.targets": ["lm_head"]},
        r"rules\.ffn\.targets: model\.layers\.0\.self_attn\.q_proj belongs to no feed-forward part",
    ),
    (tiny_llama, {"renormalise": False}, r"rules\.ffn\.router: got a 'topk' router whose weights need not sum to 1"),
    (tiny_llama, {"capacity_factor": 1.5}, r"valid: 'topk' with renormalise and without capacity_factor"),
    (tiny_llama, {"share_router": True}, r"rules\.ffn\.router\.share_router: got true, but experts of kind 'ffn_lora'"),
]


@pytest.mark.parametrize(("make", "changes", "message"), MISTAKES)
def test_rules_that_cannot_be_met(make, changes, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(make(), mixlora(**changes))


@pytest.mark.parametrize(
    "sizes",
    [
        [(6, 9)],  # no last linear
        [(6, 9), (9, 5)],  # the last does not give back what the first reads
        [(6, 9), (9, 6), (6, 1)],  # a gate beside it
        [(6, 9), (9, 6), (6, 9), (9, 6)],  # two parts in one block
        [(6, 9), (5, 9), (9, 6)],  # the first linears read two inputs
    ],
)
def test_blocks_without_the_structure(sizes):
    listed = ", ".join(f"{n} {i} x {o}" for n, (i, o) in enumerate(sizes))
    with pytest.raises(
        ConfigError, match=rf"layers\.0 has no feed-forward part .*: {listed}; valid: linears that read"
    ):
        mixora.plan(Odd(*sizes), ffn_only())


@pytest.mark.parametrize(
    ("sizes", "roles"),
    [
        ([(6, 9), (9, 6), (6, 9)], ["first", "last", "first"]),  # the last linear is not the last one of the model
        ([(6, 6), (6, 6), (6, 6)], ["first", "first", "last"]),  # widths tell nothing: the order does
        ([(6, 18), (9, 6)], ["first", "last"]),
    ],
)
def test_roles_by_widths(sizes, roles):
    assert [site.role for site in mixora.plan(Odd(*sizes), ffn_only()).sites] == roles


def test_one_part_has_one_number_of_experts():
    names = ("gate_proj", "up_proj", "down_proj")
    ranks = {f"layers.0.{name}": (2, 2, 2) if name == "up_proj" else (2, 2) for name in names}
    config = mixora.MixoraConfig(rules=ffn_only().rules, allocation=ranks)
    with pytest.raises(
        ConfigError, match=r"gives layers\.0\.up_proj 3 experts, where the first linear .* has 2; valid"
    ):
        mixora.plan(Part(), config)


def test_broad_experts_are_computed_one_by_one():
    """Each choice of a token has a row of its own: the breadth is the sum of ranks."""
    at_most = Choice.on(tiny_llama()).limit // 8
    for rank, kernel in ((at_most, "stacked"), (at_most + 1, "sorted")):
        sites = mixora.plan(tiny_llama(), mixora.recipe("mixlora", **{"rules.ffn.expert.rank": rank})).sites
        assert {site.kernel for site in sites if site.rule == "ffn"} == {kernel}
