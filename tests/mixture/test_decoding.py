"""Without gradients, linears that read one input decide at once: the same numbers, token by token, whatever changed."""

import copy
import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

import mixora
from mixora.mixture import decoding
from mixora.passes import tracing
from tests.models import adapt, fill, tiny_llama, token_ids

SMALL = {"num_experts": 4, "top_k": 2, "rank": 2, "dropout": 0.0}
SHARED = {"expert_dropout": 0.0, "targets": ["all-linear"], "share_router": True}
FULL = {"capacity_factor": 0.5, "min_capacity": 1, "capacity_at_inference": True}
RECIPES = [
    mixora.recipe("mola", **SMALL),
    mixora.recipe("sira", num_experts=4, top_k=2, rank=2, **SHARED),
    mixora.recipe("sira", num_experts=4, top_k=2, rank=2, expert_dropout=0.0, targets=["all-linear"], **FULL),
    mixora.recipe("adamole"),
    mixora.recipe("adamoe"),
    mixora.recipe("molora"),
    mixora.recipe("lora"),
    mixora.recipe("adamix-lora"),
    mixora.recipe("adamix-lora", num_experts=3, share="none", tied=True),
]


def make(config=RECIPES[0], dtype=torch.float32):
    return fill(adapt(tiny_llama(layers=4).to(dtype), config)).eval()


def decode(model, ids, prompt):
    """Logits of a prompt, then of one token after the other."""
    cache, pieces = DynamicCache(), [ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)]
    with torch.no_grad():
        found = [model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    return torch.cat(found, dim=1)


def with_graph(model, ids):
    return model(input_ids=ids).logits.detach()


@pytest.mark.parametrize("config", RECIPES, ids=lambda c: c.recipe)
@pytest.mark.parametrize("rows", [1, 3])
def test_without_gradients_the_numbers_are_those_with_them(config, rows):
    model, ids = make(config), token_ids(rows, 7)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, with_graph(model, ids), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("config", [c for i, c in enumerate(RECIPES) if i != 2], ids=lambda c: c.recipe)
def test_token_by_token_gives_what_a_whole_pass_gives(config, rows):
    model, ids = make(config), token_ids(rows, 7)
    torch.testing.assert_close(decode(model, ids, 3), with_graph(model, ids), rtol=1e-4, atol=1e-5)


def test_a_prompt_with_padding_routes_as_with_gradients():
    model, ids = make(), token_ids(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    want = model(input_ids=ids, attention_mask=mask).logits.detach()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)


def test_in_low_precision_a_token_is_no_further_from_float64_than_with_gradients():
    ids = token_ids(1, 2)
    exact = with_graph(make(dtype=torch.float64), ids)
    model = make(dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "mixora_" in n} == {torch.float32}
    found, plain = decode(model, ids, 1), with_graph(model, ids)
    assert found.dtype == plain.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()


def test_a_trace_sees_every_linear_without_gradients_too():
    model, ids = make(), token_ids(1, 3)
    with torch.no_grad(), tracing() as trace:
        model(input_ids=ids)
    assert len(trace.observations) == 4 * 7


def step(model):
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.mul_(1.5)


def train(model):
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=token_ids(2, 5)).logits.square().mean().backward()
    torch.optim.SGD(trained, lr=0.5).step()
    model.zero_grad()
    model.eval()


def load(model):
    model.load_state_dict({name: tensor * 1.5 for name, tensor in model.state_dict().items()})


def switch(model):
    model.add_adapter("other", mixora.recipe("mola", **{**SMALL, "rank": 3}))
    fill(model, seed=5).set_adapter("other")
    model.eval()


@pytest.mark.parametrize("change", [step, train, load, switch], ids=lambda f: f.__name__)
def test_what_changed_after_decoding_is_seen(change):
    model, ids = make(), token_ids(1, 5)
    before = decode(model, ids, 2)
    other = copy.deepcopy(model)
    change(model)
    found = decode(model, ids, 2)
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, with_graph(model, ids), rtol=1e-4, atol=1e-5)
    assert torch.equal(decode(other, ids, 2), before)


def test_a_model_in_another_dtype_decodes_in_it():
    model, ids = make(), token_ids(1, 5)
    before = decode(model, ids, 2)
    found = decode(model.double(), ids, 2)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, before.double(), rtol=1e-3, atol=1e-4)


def test_merging_and_back_leaves_what_is_decoded():
    model, ids = make(mixora.recipe("lora")), token_ids(1, 5)
    before = decode(model, ids, 2)
    model.merge_adapter()
    torch.testing.assert_close(decode(model, ids, 2), before, rtol=1e-3, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(decode(model, ids, 2), before, rtol=1e-3, atol=1e-4)


def change_in_place(model):
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.mul_(1.5)


def disable(model):
    model.base_model.disable_adapter_layers()


def hook_a_frozen_linear(model):
    frozen = model.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")
    frozen.register_forward_hook(lambda module, args, output: output * 2)


def replace_a_frozen_weight(model):
    frozen = model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj.base_layer")
    frozen.weight = torch.nn.Parameter(frozen.weight * 2, requires_grad=False)


@pytest.mark.parametrize(
    "change",
    [change_in_place, train, switch, disable, hook_a_frozen_linear, replace_a_frozen_weight],
    ids=lambda f: f.__name__,
)
def test_what_changes_between_two_tokens_is_seen(change):
    model, ids, cache = make(), token_ids(1, 4), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :2], past_key_values=cache)
        before = model(input_ids=ids[:, 2:3], past_key_values=cache).logits
    change(model)
    plain = model(input_ids=ids[:, 3:], past_key_values=copy.deepcopy(cache)).logits.detach()
    with torch.no_grad():
        found = model(input_ids=ids[:, 3:], past_key_values=cache).logits
    assert not torch.allclose(found, before, atol=1e-3)
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_who_serves_where_routes_are_drawn_may_change_between_two_tokens():
    model, ids, cache = make(mixora.recipe("adamix-lora")), token_ids(1, 7), DynamicCache()
    with torch.no_grad():
        model(input_ids=ids[:, :2], past_key_values=cache)
    ways = ("merged", "fixed", "random", "random", "merged")
    for way, seed, token in zip(ways, range(5), ids[:, 2:].split(1, dim=1), strict=True):
        before = copy.deepcopy(cache)
        with mixora.served_by(model, way, expert=1):
            torch.manual_seed(seed)
            with torch.no_grad():
                found = model(input_ids=token, past_key_values=cache).logits
            torch.manual_seed(seed)
            plain = model(input_ids=token, past_key_values=before).logits.detach()
        torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_weights_are_stacked_once_for_a_cache_and_go_with_it(monkeypatch):
    model, made = make(), []

    def spy(*given, own=decoding.Stack.of):
        made.append(own(*given))
        return made[-1]

    monkeypatch.setattr(decoding.Stack, "of", spy)
    found = decode(model, token_ids(1, 6), 2)
    groups = 4 * len([("q", "k", "v"), ("o",), ("gate", "up"), ("down",)])
    assert len(made) == groups
    torch.testing.assert_close(decode(model, token_ids(1, 6), 2), found)
    assert len(made) == 2 * groups
    rows = [weakref.ref(stack.rows_CI) for stack in made]
    made.clear()
    gc.collect()
    assert not [row for row in rows if row() is not None]


def test_without_a_cache_nothing_is_kept(monkeypatch):
    model, rows = make(), []

    def spy(*given, own=decoding.Stack.of):
        stack = own(*given)
        rows.append(weakref.ref(stack.rows_CI))
        return stack

    monkeypatch.setattr(decoding.Stack, "of", spy)
    with torch.no_grad():
        model(input_ids=token_ids(2, 5), use_cache=False)
    assert rows
    assert not [row for row in rows if row() is not None]
