"""Values over depth: by hand, with every mistake in words."""

import pytest
from transformers import T5Config, T5ForConditionalGeneration

import mixora
from mixora.depth import Depth, depths_of, value_at
from mixora.errors import ConfigError
from tests.models import tiny_llama, tiny_t5


@pytest.mark.parametrize(
    ("value", "layers", "expected"),
    [
        (3, 4, [3, 3, 3, 3]),
        ([2, 4, 6, 8], 8, [2, 2, 4, 4, 6, 6, 8, 8]),
        ([5, 1, 7], 3, [5, 1, 7]),
        # 6 layers in 4 groups: 0 * 4 // 6, 1 * 4 // 6, ...
        ([2, 4, 6, 8], 6, [2, 2, 4, 6, 6, 8]),
        ({"from": 2, "to": 8}, 4, [2, 4, 6, 8]),
        ({"from": 8, "to": 2}, 3, [8, 5, 2]),
        # 1, 1.5, 2: halves up, in both directions
        ({"from": 1, "to": 2}, 3, [1, 2, 2]),
        ({"from": 2, "to": 1}, 3, [2, 2, 1]),
        ({"from": 3, "to": 9}, 1, [3]),
    ],
)
def test_values_by_layer(value, layers, expected):
    assert [value_at(value, Depth("layers", layer, layers), "rank") for layer in range(layers)] == expected


def test_depth_counts_the_matched_layers_of_each_stack():
    depths = depths_of(["decoder.3.a", "decoder.5.a", "decoder.5.b", "encoder.0.layer.7.a", "head"])
    assert depths == {
        "decoder.3.a": Depth("decoder", 0, 2),
        "decoder.5.a": Depth("decoder", 1, 2),
        "decoder.5.b": Depth("decoder", 1, 2),
        "encoder.0.layer.7.a": Depth("encoder", 0, 1),
        "head": Depth("head", 0, 1),
    }


def sizes(model, name="hilo", **changes):
    sites = mixora.plan(model, mixora.recipe(name, **changes)).sites
    return {site.path: (site.num_experts, set(site.ranks), site.top_k) for site in sites}


def test_hilo_on_a_llama():
    found = sizes(tiny_llama(layers=4), num_experts=[1, 2, 3, 4], rank={"from": 1, "to": 7})
    for layer, expected in enumerate([(1, {1}, 1), (2, {3}, 2), (3, {5}, 2), (4, {7}, 2)]):
        for leaf in ("self_attn.q_proj", "mlp.down_proj"):
            assert found[f"model.layers.{layer}.{leaf}"] == expected
    assert len(found) == 28


def test_encoder_and_decoder_have_their_own_depth():
    sizes_t5 = {"d_model": 16, "d_kv": 4, "d_ff": 8, "num_heads": 2, "vocab_size": 9}
    model = T5ForConditionalGeneration(T5Config(num_layers=2, num_decoder_layers=4, **sizes_t5))
    found = sizes(model, rank=[3, 5], num_experts=[2, 4])
    experts = {path: value[0] for path, value in found.items()}
    assert [experts[f"encoder.block.{n}.layer.0.SelfAttention.q"] for n in range(2)] == [2, 4]
    assert [experts[f"decoder.block.{n}.layer.1.EncDecAttention.k"] for n in range(4)] == [2, 2, 4, 4]


def test_top_k_over_depth():
    found = sizes(tiny_llama(layers=2), "sira", num_experts=4, top_k=[1, 3])
    assert [found[f"model.layers.{n}.self_attn.q_proj"][2] for n in range(2)] == [1, 3]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "hilo",
            {},
            r"rules\.linears\.expert\.rank: got 4 values for the 2 layers of model\.layers; valid: at most one",
        ),
        ("hilo", {"rank": 2, "targets": ["lm_head"]}, r"router\.num_experts: got 4 values for the 1 layer of lm_head"),
        ("sira", {"num_experts": [2, 8]}, r"rules\.attention\.router\.top_k: got 4 where num_experts is 2; valid: at"),
        ("hilo", {"rank": []}, r"rules\.linears\.expert\.rank: got \[\]; valid: .*at least 1 item"),
        ("hilo", {"rank": [2, 0]}, r"^rules\.linears\.expert\.rank\.1: got 0; valid: greater than or equal to 1$"),
        ("hilo", {"rank": {"from": 2}}, r"^rules\.linears\.expert\.rank\.to: is required$"),
        ("hilo", {"rank": {"from": 2, "to": 4, "by": 1}}, r"^rules\.linears\.expert\.rank\.by: unknown key"),
        ("hilo", {"rank": 1.5}, r"^rules\.linears\.expert\.rank: got 1\.5; valid: a valid integer"),
    ],
)
def test_mistakes_are_named(name, changes, message):
    with pytest.raises(ConfigError, match=message):
        mixora.plan(tiny_llama(layers=2), mixora.recipe(name, **changes))


def test_a_decoder_shorter_than_the_list_is_named():
    with pytest.raises(ConfigError, match=r"4 values for the 2 layers of encoder\.block"):
        mixora.plan(tiny_t5(), mixora.recipe("hilo"))


def test_the_printed_plan_has_a_row_for_each_depth():
    text = str(mixora.plan(tiny_llama(layers=8), mixora.recipe("hilo")))
    for group in ("{0-1}", "{2-3}", "{4-5}", "{6-7}"):
        assert text.count(group) == 7
