"""Where adapters can stand: streams, causality and linears that read the same input."""

import pytest
import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

import mixora
from mixora.passes import tracing
from mixora.planning.sites import linears_of
from tests.models import (
    adapt,
    fill,
    gradients,
    tiny_bert,
    tiny_bert_classifier,
    tiny_gpt2,
    tiny_llama,
    tiny_t5,
    token_ids,
)

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "expert_dropout": 0.3}


@pytest.mark.parametrize(
    ("make", "is_causal"), [(tiny_llama, True), (tiny_gpt2, True), (tiny_bert, False), (tiny_bert_classifier, False)]
)
def test_decoders_are_causal_and_encoders_are_not(make, is_causal):
    linears = linears_of(make())
    assert {linear.is_causal for linear in linears} == {is_causal}
    assert {linear.stream for linear in linears} == {"source"}


def test_a_decoder_without_its_head_is_causal():
    assert {linear.is_causal for linear in linears_of(tiny_llama().model)} == {True}


def test_a_language_model_is_causal_by_its_name_where_no_module_says_so():
    class ToyForCausalLM(nn.Sequential):
        pass

    assert linears_of(ToyForCausalLM(nn.Linear(2, 2)))[0].is_causal
    assert not linears_of(nn.Sequential(nn.Linear(2, 2)))[0].is_causal


def test_an_encoder_decoder_has_two_streams():
    for linear in linears_of(tiny_t5()):
        reads_source = linear.path.startswith("encoder") or linear.path.endswith(("Attention.k", "Attention.v"))
        reads_source &= "decoder" not in linear.path or "EncDecAttention" in linear.path
        assert linear.stream == ("source" if reads_source else "target"), linear.path
        assert linear.is_causal == (linear.stream == "target")


def test_heads_and_embeddings_belong_to_no_group():
    groups = {linear.path: linear.group for linear in linears_of(tiny_bert_classifier())}
    assert groups["classifier"] is None
    assert groups["bert.pooler.dense"] is None
    assert groups["bert.encoder.layer.1.attention.output.dense"] == "attention"
    assert groups["bert.encoder.layer.1.output.dense"] == "feed-forward"


def test_a_wrapped_linear_keeps_its_path_and_widths():
    plain, model = tiny_llama(), adapt(tiny_llama(), mixora.recipe("sira", **SMALL))
    assert linears_of(model.get_base_model()) == linears_of(plain)


def routings(model, **inputs):
    with tracing() as trace:
        model(**inputs)
    return {o.path: o.routing for o in trace.observations}


@pytest.mark.parametrize("training", [True, False])
def test_siblings_share_one_routing_at_run_time(training):
    config = mixora.recipe("sira", **SMALL, targets=["all-linear"], share_router=True)
    seen = routings(adapt(tiny_llama(), config).train(training), input_ids=token_ids(2, 6))
    for layer in range(2):
        q, k, v, o = (seen[f"model.layers.{layer}.self_attn.{name}_proj"] for name in "qkvo")
        gate, up, down = (seen[f"model.layers.{layer}.mlp.{name}_proj"] for name in ("gate", "up", "down"))
        assert q is k is v
        assert gate is up
        assert len({id(r) for r in (q, o, gate, down)}) == 4
    assert seen["model.layers.0.self_attn.q_proj"] is not seen["model.layers.1.self_attn.q_proj"]


def test_without_sharing_every_site_routes_for_itself():
    seen = routings(adapt(tiny_llama(), mixora.recipe("sira", **SMALL)), input_ids=token_ids(2, 6))
    assert len({id(routing) for routing in seen.values()}) == 8


def test_cross_attention_shares_between_key_and_value_only():
    config = mixora.recipe("sira", **SMALL, share_router=True)
    ids = token_ids(2, 6)
    seen = routings(adapt(tiny_t5(), config), input_ids=ids, labels=token_ids(2, 4))
    q, k, v, _ = (seen[f"decoder.block.0.layer.1.EncDecAttention.{name}"] for name in "qkvo")
    assert k is v
    assert q is not k
    assert len(q.valid_T) == 8
    assert len(k.valid_T) == 12


class ThreeInputs(nn.Module):
    """Linears named like siblings that need not read the same tensor."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, q, k, v):
        return self.q_proj(q), self.k_proj(k), self.v_proj(v)


def three_inputs(**changes):
    torch.manual_seed(0)
    config = mixora.recipe(
        "sira", **{**SMALL, "expert_dropout": 0.0}, targets=["q_proj", "k_proj", "v_proj"], **changes
    )
    return fill(adapt(ThreeInputs(), config), std=1)


def test_siblings_with_other_inputs_route_for_themselves_with_the_same_router():
    model = three_inputs(share_router=True)
    q, k = torch.randn(3, 4), torch.randn(3, 4)
    seen = routings(model, q=q, k=k, v=k)
    w_EI = model.get_submodule("base_model.model.q_proj").mixora_router["default"]
    for name, x in (("q_proj", q), ("k_proj", k), ("v_proj", k)):
        torch.testing.assert_close(seen[name].logits_TE, x @ w_EI.T)
    assert seen["k_proj"] is seen["v_proj"]


def test_sharing_equals_separate_routers_of_equal_weights():
    shared, apart = three_inputs(share_router=True), three_inputs()
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            one, other = (m.get_submodule(f"base_model.model.{name}") for m in (shared, apart))
            for kind in "AB":
                tensor = getattr(one, f"mixora_{kind}")["default"]
                getattr(other, f"mixora_{kind}")["default"].copy_(tensor)
            leader = shared.get_submodule("base_model.model.q_proj")
            other.mixora_router["default"].copy_(leader.mixora_router["default"])
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    for inputs in ({"q": x, "k": x, "v": x}, {"q": x, "k": y, "v": x}):
        for got, want in zip(shared(**inputs), apart(**inputs), strict=True):
            torch.testing.assert_close(got, want)


def test_the_shared_router_learns_from_all_who_use_it():
    """Its task gradient is the sum of what separate routers of equal weights would get."""
    found = {}
    for name in ("q", "k", "v"):
        model = three_inputs(share_router=True, **{"losses.load_balance.coefficient": 0.0})
        x = torch.linspace(-1, 1, 12).reshape(3, 4)
        outputs = dict(zip("qkv", model(x, x, x), strict=True))
        outputs[name].sum().backward()
        found[name] = model.get_submodule("base_model.model.q_proj").mixora_router["default"].grad
    assert all(gradient.abs().max() > 1e-4 for gradient in found.values())


def tiny_q_former():
    """Its cross-attention reads hidden states of width 32 for queries, and an image encoder's of width 40."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "encoder_hidden_size": 40, "intermediate_size": 48, "num_attention_heads": 4}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return Blip2QFormerModel(Blip2QFormerConfig(num_hidden_layers=2, **sizes, **no_dropout))


@pytest.mark.parametrize("share_router", [False, True])
def test_what_reads_another_width_is_no_kin(share_router):
    found = []
    images = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kernel in ("joint", "stacked"):
        model = adapt(tiny_q_former(), mixora.recipe("sira", **SMALL, kernel=kernel, share_router=share_router))
        y = model.double().eval()(query_embeds=images[:, :3, :32], encoder_hidden_states=images).last_hidden_state
        y.square().sum().backward()
        found.append((y.detach(), gradients(model)))
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)
    plan = mixora.plan(tiny_q_former(), mixora.recipe("sira", **SMALL, share_router=share_router))
    leaders = {site.path.rpartition(".")[2]: site.leader for site in plan.sites if "0.crossattention" in site.path}
    shared = "encoder.layer.0.crossattention.attention.key" if share_router else None
    assert leaders == {"query": None, "key": None, "value": shared, "dense": None}
