"""Activations that are made again in backward: the same bits, fewer bytes, and other hooks left alone."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mixora
from benchmarks.measuring import LiveBytes
from mixora.passes import activations
from mixora.passes.activations import find_kept, find_recipe, lean_activations
from tests.models import (
    adapt,
    gradients,
    tiny_bert_classifier,
    tiny_gemma,
    tiny_gpt2,
    tiny_llama,
    tiny_phi3,
    tiny_t5,
    tiny_vit,
    token_ids,
)


@pytest.fixture
def keeps_nothing_small(monkeypatch):
    monkeypatch.setattr(activations, "SMALL_BYTES", 0)


def operand(dtype=torch.float32, seed=0, shape=(2, 6, 8)):
    torch.manual_seed(seed)
    return torch.randn(shape, dtype=dtype).requires_grad_() * 1


MADE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu, tanh": lambda x: F.gelu(x, approximate="tanh"),
    "product": lambda x: x * F.silu(x),
    "product with a constant": lambda x: F.silu(x) * torch.arange(8.0).to(x.dtype),
    "product with a number": lambda x: 0.3 * F.silu(x),
    "norm": lambda x: torch.ones(8, dtype=x.dtype) * (x.float() * x.float().mean(-1, keepdim=True)).to(x.dtype),
    "view": lambda x: F.silu(x).view(12, 8),
    "transposed and flattened": lambda x: F.silu(x).transpose(-1, -2).reshape(2, -1),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]).transpose(1, 2).reshape(12, 8),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_what_is_made_again_is_the_same_to_the_last_bit(make, dtype):
    made = make(operand(dtype))
    with torch.no_grad():
        again = find_recipe(made.grad_fn)()
    assert again.dtype == dtype and torch.equal(again, made)


@pytest.mark.parametrize("make", [lambda x: x + 1, torch.exp, lambda x: x @ x.mT, lambda x: 2 * x], ids="abcd")
def test_what_is_not_cheap_or_whose_operands_are_not_kept_is_kept(make):
    assert find_recipe(make(operand()).grad_fn) is None


@given(st.lists(st.sampled_from(["silu", "gelu", "square", "half", "turn", "flat", "mix"]), min_size=1, max_size=7))
def test_any_chain_has_the_gradient_that_it_has_without(steps):
    def compute(x):
        steps_of = {
            "silu": F.silu,
            "gelu": F.gelu,
            "square": lambda x: x * x,
            "half": lambda x: x * 0.5,
            "turn": lambda x: x.transpose(0, 1),
            "flat": lambda x: x.reshape(8, 6).reshape(6, 8),
            "mix": lambda x: x.contiguous().view(6, 8) * torch.linspace(-1, 1, 8),
        }
        for step in steps:
            x = steps_of[step](x).reshape(6, 8)
        return (x**2).sum()

    plain, lean = operand(shape=(6, 8)).detach().requires_grad_(), operand(shape=(6, 8)).detach().requires_grad_()
    compute(plain).backward()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "SMALL_BYTES", 0)
        with lean_activations():
            loss = compute(lean)
    loss.backward()
    assert torch.equal(plain.grad, lean.grad)


IDS = token_ids(2, 12)
TEXT = {"input_ids": IDS, "labels": IDS}
MODELS = {
    "llama": (tiny_llama, TEXT),
    "gemma": (tiny_gemma, TEXT),
    "phi3": (tiny_phi3, TEXT),
    "gpt2": (tiny_gpt2, TEXT),
    "t5": (tiny_t5, TEXT),
    "bert": (tiny_bert_classifier, {"input_ids": IDS, "labels": torch.tensor([0, 2])}),
    "vit": (tiny_vit, {"pixel_values": torch.randn(2, 3, 8, 8), "labels": torch.tensor([0, 1])}),
}


def take_step(make, batch, dtype=torch.float32, autocast=False, prepare=lambda model: None):
    """The loss and every gradient of one step of an adapted model."""
    model = adapt(make().to(dtype), mixora.recipe("sira"))
    prepare(model)
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = mixora.compute_loss(model, batch)
    loss.backward()
    return loss.detach(), gradients(model)


def keep_all(monkeypatch):
    monkeypatch.setattr("mixora.training.batch_loss.lean_activations", nullcontext)


@pytest.mark.parametrize("numbers", ["float32", "bfloat16", "bfloat16 by autocast"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_is_the_same_to_the_last_bit(kind, numbers, keeps_nothing_small, monkeypatch):
    make, batch = MODELS[kind]
    settings = {"dtype": torch.bfloat16} if numbers == "bfloat16" else {"autocast": "autocast" in numbers}
    if kind == "vit" and numbers == "bfloat16":
        batch = {**batch, "pixel_values": batch["pixel_values"].bfloat16()}
    lean = take_step(make, batch, **settings)
    keep_all(monkeypatch)
    plain = take_step(make, batch, **settings)
    assert torch.equal(lean[0], plain[0])
    assert lean[1].keys() == plain[1].keys() and all(torch.equal(lean[1][name], plain[1][name]) for name in plain[1])


def test_checkpointing_goes_on_inside(keeps_nothing_small, monkeypatch):
    def prepare(model):
        model.gradient_checkpointing_enable({"use_reentrant": False})

    lean = take_step(tiny_llama, TEXT, prepare=prepare)
    keep_all(monkeypatch)
    plain = take_step(tiny_llama, TEXT)
    assert torch.equal(lean[0], plain[0])
    assert all(torch.equal(lean[1][name], plain[1][name]) for name in plain[1])


def test_less_is_kept():
    x, kept = operand(shape=(512, 512)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(find_kept(t)) or t, lambda t: t):
        (F.silu(x) * (x + 1)) @ torch.eye(512).requires_grad_()
    # x by silu, x + 1 by the product, the matrix; neither silu(x) nor the product
    assert len(kept) == 5
    assert sum(isinstance(one, torch.Tensor) for one in kept) == 3


def test_operands_changed_in_place_are_an_error(keeps_nothing_small):
    x = operand()
    with lean_activations():
        y = F.silu(x)
        loss = (y * y).sum()
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hooks_of_others_stay_in_force(keeps_nothing_small):
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t), lean_activations():
        y = F.silu(operand())
        y * y
    assert any(torch.equal(y, tensor) for tensor in packed)


def test_a_graph_can_be_walked_twice_and_differentiated_twice(keeps_nothing_small):
    def compute(x):
        return (F.silu(x) * x * 0.5).pow(2).sum()

    x = operand(torch.float64, shape=(3, 4)).detach().requires_grad_()
    with lean_activations():
        loss = compute(x)
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x, retain_graph=True)[0], first)
    graphs = [torch.autograd.grad(value, x, create_graph=True)[0] for value in (loss, compute(x))]
    second, expected = (torch.autograd.grad(graph.sum(), x)[0] for graph in graphs)
    torch.testing.assert_close(second, expected)


def test_what_never_went_backward_is_freed(keeps_nothing_small):
    x = operand().detach().requires_grad_()
    with LiveBytes() as live:
        with lean_activations():
            y = F.scaled_dot_product_attention(x, x, x).transpose(1, 2).reshape(2, -1) * x.sum()
            z = torch.exp(F.silu(y) * y)
        assert live.now > 0
        del y, z
        assert live.now == 0


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_keeps_its_input_so_too(reentrant, keeps_nothing_small):
    x = operand(torch.float64).detach().requires_grad_()
    with lean_activations():
        loss = checkpoint(torch.sin, F.silu(x * 2), use_reentrant=reentrant).sum()
    loss.backward()
    expected = torch.autograd.grad(torch.sin(F.silu(x * 2)).sum(), x)[0]
    assert torch.equal(x.grad, expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_models_choose_by_themselves(keeps_nothing_small):
    @torch.compile(backend="aot_eager", fullgraph=False)
    def block(x):
        return F.silu(x) * x

    x = operand().detach().requires_grad_()
    with lean_activations():
        loss = (block(x * 2) * 3).pow(2).sum()
    loss.backward()
    expected = torch.autograd.grad(((F.silu(x * 2) * (x * 2)) * 3).pow(2).sum(), x)[0]
    torch.testing.assert_close(x.grad, expected)
