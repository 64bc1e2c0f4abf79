"""Kernel joint on whole models: the numbers of `stacked`, whoever calls the linears, and however."""

import copy
import logging

import pytest
import torch
from peft import get_peft_model
from torch import nn

import mixora
from mixora.mixture import mixtures_of
from mixora.passes import tracing
from tests.models import adapt, fill, gradients, tiny_bert_classifier, tiny_gpt2, tiny_llama, tiny_t5, token_ids

IDS = token_ids(2, 8)
MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
TEXT = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS.where(MASK == 1, -100)}
CLASSES = {"input_ids": IDS, "attention_mask": MASK, "labels": torch.tensor([0, 2])}
RECIPES = {
    "sira": {"num_experts": 4, "top_k": 2, "rank": 2},
    "mola": {"num_experts": 3, "top_k": 2, "rank": 2, "dropout": 0.0},
    "molora": {"num_experts": 3, "rank": 2},
    "adamole": {"num_experts": 3, "rank": 2},
    "adamoe": {"num_experts": 3, "null_experts": 2, "top_k": 2, "rank": 2},
    "lora": {},
}
BASES = {
    "llama": (tiny_llama, TEXT),
    "bert": (tiny_bert_classifier, CLASSES),
    "t5": (tiny_t5, TEXT),
    "gpt2": (tiny_gpt2, TEXT),
}


def make(recipe, kernel, base=tiny_llama, **changes):
    return adapt(base(), mixora.recipe(recipe, kernel=kernel, **{**RECIPES[recipe], **changes})).double()


def step(model, batch=TEXT, seed=3):
    torch.manual_seed(seed)
    output = model(**batch)
    output.loss.backward()
    return output.logits.detach(), gradients(model)


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-10, atol=1e-12)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_computes_what_it_does_with_stacked(recipe, base):
    make_base, batch = BASES[base]
    assert_same(*(step(make(recipe, kernel, make_base), batch) for kernel in ("joint", "stacked")))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputed_layers_compute_the_same(use_reentrant):
    model = make("sira", "joint")
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    assert_same(step(model), step(make("sira", "stacked")))


def test_one_product_serves_the_linears_that_read_one_input(monkeypatch):
    counts = []
    from mixora.mixture import joining

    def spy(x, x_TI, experts, routers, dropout, own=joining.join):
        counts.append((len(experts), len(routers)))
        return own(x, x_TI, experts, routers, dropout)

    monkeypatch.setattr(joining, "join", spy)
    step(make("mola", "joint"))
    # q, k, v; o; gate, up; down in each of two layers
    assert counts == [(3, 3), (1, 1), (2, 2), (1, 1)] * 2


def test_a_shared_router_is_multiplied_once(monkeypatch):
    assert_same(*(step(make("sira", kernel, share_router=True)) for kernel in ("joint", "stacked")))


class Odd(nn.Module):
    """Linears named like siblings, called in ways that no attention does."""

    def __init__(self, calls):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 5) for _ in range(3))
        self.calls = calls

    def forward(self, x, attention_mask=None):
        return self.calls(self, x)


CALLS = {
    "one of three": lambda m, x: m.k_proj(x),
    "another order": lambda m, x: m.v_proj(x) + 2 * m.q_proj(x) - m.k_proj(x),
    "different inputs": lambda m, x: m.q_proj(x) + m.k_proj(x * 2) + m.v_proj(x),
    "the same one twice": lambda m, x: m.q_proj(x) + m.q_proj(x) + m.k_proj(x),
    "one output unused": lambda m, x: (m.q_proj(x), m.k_proj(x))[1] + m.v_proj(x).detach(),
}


@pytest.mark.parametrize("name", CALLS)
def test_linears_may_be_called_in_any_way(name):
    found = []
    for kernel in ("joint", "stacked"):
        torch.manual_seed(0)
        config = mixora.recipe("sira", targets=["q_proj", "k_proj", "v_proj"], kernel=kernel, **RECIPES["sira"])
        model = adapt(Odd(CALLS[name]), config).double()
        x = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
        y = model(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found.append((y.detach(), {"x": x.grad, **gradients(model)}))
    assert_same(*found)


def test_an_input_that_changes_between_two_linears_is_read_anew():
    torch.manual_seed(0)
    config = mixora.recipe("sira", targets=["q_proj", "k_proj"], kernel="joint", **RECIPES["sira"])
    model = adapt(Odd(lambda m, x: (m.q_proj(x), m.k_proj(x.mul_(2)))), config).eval()
    x = torch.randn(2, 4, 6)
    with torch.no_grad():
        q, k = model(x.clone())
        torch.testing.assert_close(q, model.base_model.model.q_proj(x))
        torch.testing.assert_close(k, model.base_model.model.k_proj(2 * x))


def hooked(model):
    mixtures_of(model)[0].base_layer.register_forward_hook(lambda module, args, output: output * 1.5)


def trained(model):
    mixtures_of(model)[1].base_layer.weight.requires_grad_()


def replaced(model):
    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    mixtures_of(model)[2].base_layer.__class__ = Louder


def patched(model):
    frozen = mixtures_of(model)[0].base_layer
    frozen.forward = lambda x: nn.Linear.forward(frozen, x) + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hooked, "has hooks"), (trained, "is trained"), (replaced, "is a Louder"), (patched, "has hooks")],
)
def test_frozen_modules_that_are_no_plain_linears_are_called(change, reason, caplog):
    found = []
    with caplog.at_level(logging.INFO, "mixora"):
        for kernel in ("joint", "stacked"):
            model = make("sira", kernel)
            change(model)
            found.append(step(model))
            step(model)
    assert_same(*found)
    said = [record.message for record in caplog.records if "kernel 'stacked' computes its experts" in record.message]
    assert len(said) == 1
    assert f"the frozen module {reason}" in said[0]


def test_two_active_adapters_are_added_up():
    model = make("lora", "joint")
    expected = make("lora", "stacked")
    for one in (model, expected):
        torch.manual_seed(7)
        one.add_adapter("second", mixora.recipe("sira", **RECIPES["sira"]))
        fill(one, seed=5).double()
        one.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(IDS).logits, expected.eval()(IDS).logits)


def test_copies_and_inference_mode():
    model, other = (make("sira", kernel, lambda: tiny_llama(layers=1)).eval() for kernel in ("joint", "stacked"))
    expected = other(IDS).logits
    model(**TEXT).loss.backward()
    with torch.inference_mode():
        torch.testing.assert_close(copy.deepcopy(model)(IDS).logits, expected)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS).logits, expected)


def test_dropout_is_one_mask_for_what_reads_one_input():
    torch.manual_seed(0)
    settings = {"targets": ["q_proj", "v_proj"], "rank": 2, "dropout": 0.5, "kernel": "joint"}
    model = adapt(Odd(lambda m, x: torch.stack([m.q_proj(x), m.v_proj(x)])), mixora.recipe("lora", **settings)).double()
    x_TI = torch.randn(7, 6, dtype=torch.float64)
    torch.manual_seed(9)
    found = model(x_TI)
    torch.manual_seed(9)
    mask_TI = torch.empty(7, 6, dtype=torch.bool).bernoulli_(0.5)
    for y_TO, layer in zip(found, mixtures_of(model), strict=True):
        a_RI, b_RO = layer.parameters_of("default").values()
        expected = layer.base_layer(x_TI) + 16 * (x_TI * mask_TI * 2) @ a_RI.T @ b_RO
        torch.testing.assert_close(y_TO, expected)
    model.eval()
    assert not torch.equal(model(x_TI), found)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradients_are_those_of_differences(dropout):
    settings = {
        "targets": ["q_proj", "k_proj"],
        "rank": 2,
        "dropout": dropout,
        "kernel": "joint",
        "num_experts": 3,
        "top_k": 2,
    }
    model = adapt(Odd(lambda m, x: m.q_proj(x) * m.k_proj(x)), mixora.recipe("mola", **settings)).double()
    x_TI = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(x_TI, *parameters):
        torch.manual_seed(4)
        with tracing(owns_losses=True):
            return model(x_TI)

    assert torch.autograd.gradcheck(run, (x_TI, *parameters), eps=1e-6, atol=1e-6)


def test_low_precision_is_near_the_exact_numbers():
    """Weights and activations in bf16: the routers' outputs come from the same product as the rest."""
    exact = make("mola", "stacked")
    low = get_peft_model(tiny_llama().bfloat16(), mixora.recipe("mola", kernel="joint", **RECIPES["mola"])).train()
    low.load_state_dict(exact.state_dict())
    logits, found = step(low)
    want, expected = step(exact)
    assert (logits.double() - want).norm() < 0.02 * want.norm()
    for name, gradient in expected.items():
        assert (found[name].double() - gradient).norm() < 0.2 * gradient.norm() + 1e-6, name
