"""MixLoRA from its formulas, token by token in float64: every expert is a dense feed-forward part of merged weights.

y = sum_{e in Top2} w_e FFN_e(x),   FFN_e(x) = W2_e (act(W1_e x) * W3_e x) or W2_e act(W1_e x),   W_e = W + s B_e A_e
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mixora
from tests.models import adapt, gradients, tiny_bert_classifier, tiny_gpt2, tiny_llama, token_ids

EXPERTS, TOP_K, ALPHA, DROP, BALANCE = 4, 2, 6.0, 0.3, 0.7
IDS = token_ids(2, 5)
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
RANKS = {"first": (1, 3, 2, 2), "second": (2, 1, 1, 3), "last": (2, 2, 3, 1)}


def silu(h):
    return h / (1 + torch.exp(-h))


def gelu(h):
    return h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))


def gelu_tanh(h):
    return 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))


# model; activation; feed-forward linears of block n, the last one last; what `install` replaces by the reference
FAMILIES = {
    "llama": (tiny_llama, silu, "model.layers.{}.mlp.", ("gate_proj", "up_proj", "down_proj"), "model.layers.{}.mlp"),
    "gpt2": (tiny_gpt2, gelu_tanh, "transformer.h.{}.mlp.", ("c_fc", "c_proj"), "transformer.h.{}.mlp"),
    "bert": (
        tiny_bert_classifier,
        gelu,
        "bert.encoder.layer.{}.",
        ("intermediate.dense", "output.dense"),
        "bert.encoder.layer.{}.output.dense",
    ),
}


def topk(x_I, tensors):
    """Weights by expert, the chosen ones, probabilities."""
    powers = [(row_I * x_I).sum().exp() for row_I in tensors["router"]]
    kept = sorted(range(EXPERTS), key=lambda e: -powers[e].item())[:TOP_K]
    chosen = sum(powers[e] for e in kept)
    return {e: powers[e] / chosen for e in kept}, kept, [power / sum(powers) for power in powers]


def soft(x_I, tensors):
    powers = [(row_I * x_I).sum().exp() for row_I in tensors["router"]]
    shares = [power / sum(powers) for power in powers]
    return dict(enumerate(shares)), None, shares


def threshold(x_I, tensors):
    _, _, shares = soft(x_I, tensors)
    height = (tensors["router_threshold"][0] * x_I).sum() + tensors["router_threshold_bias"][0]
    bar = 1 / (1 + torch.exp(-height)) / EXPERTS
    kept = [e for e in range(EXPERTS) if shares[e] > bar]
    whole = sum(shares[e] - bar for e in kept)
    return {e: (shares[e] - bar) / whole for e in kept}, kept, shares


def null_topk(x_I, tensors):
    """Without its balance loss, which counts null experts too."""
    powers = [(row_I * x_I).sum().exp() for row_I in tensors["router"]]
    best = sorted(range(len(powers)), key=lambda e: -powers[e].item())[:3]
    kept = [e for e in best if e < EXPERTS]
    chosen = sum(powers[e] for e in kept)
    return {e: powers[e] / chosen for e in kept}, kept, None


ROUTERS = {
    "topk": (topk, {"num_experts": EXPERTS, "top_k": TOP_K, "renormalise": True}),
    "soft": (soft, {"num_experts": EXPERTS}),
    "threshold": (threshold, {"num_experts": EXPERTS}),
    "null_topk": (null_topk, {"num_experts": EXPERTS, "null_experts": 3, "top_k": 3}),
}


class Reference(nn.Module):
    """One feed-forward part. `sites`: (frozen weight [O, I], bias, adapter tensors, ranks) of each linear."""

    def __init__(self, sites, activation, route, keep):
        super().__init__()
        self.sites, self.activation, self.route, self.keep = sites, activation, route, keep

    def linear(self, n, x_I, expert, row):
        weight, bias, tensors, ranks = self.sites[n]
        y = weight @ x_I + (0 if bias is None else bias)
        if expert is not None:
            mine = range(sum(ranks[:expert]), sum(ranks[: expert + 1]))
            update = sum(torch.outer(tensors["B"][r], tensors["A"][r]) for r in mine)
            y = y + ALPHA / max(ranks) * (update @ (x_I * self.keep[row, : len(x_I)]))
        return y

    def part(self, x_I, expert, row):
        first = self.activation(self.linear(0, x_I, expert, row))
        hidden = first * self.linear(1, x_I, expert, row) if len(self.sites) == 3 else first
        return self.linear(-1, hidden, expert, row)

    def forward(self, x_BSI):
        outputs, chosen, probability = [], [], []
        real = MASK.flatten().tolist()
        for t, x_I in enumerate(x_BSI.flatten(0, 1)):
            weights = {}
            if real[t]:
                weights, kept, shares = self.route(x_I, self.sites[0][2])
                chosen.append(list(weights.values()) if kept is None else kept)
                probability.append(shares)
            order = sorted(weights, key=lambda e, w=weights: (-w[e].item(), e))
            # the rows of dropout: all tokens' first choices, then all second ones
            parts = [weights[e] * self.part(x_I, e, k * len(real) + t) for k, e in enumerate(order)]
            outputs.append(sum(parts) if parts else self.part(x_I, None, t))
        if self.route is topk:
            flat = [e for few in chosen for e in few]
            share = [flat.count(e) / len(flat) for e in range(EXPERTS)]
        elif self.route is soft:
            share = [sum(row[e].item() for row in chosen) / len(chosen) for e in range(EXPERTS)]
        if self.route in (topk, soft):
            mean = [sum(p[e] for p in probability) / len(probability) for e in range(EXPERTS)]
            self.balance = EXPERTS * sum(f * p for f, p in zip(share, mean, strict=True))
        return torch.stack(outputs).reshape(*x_BSI.shape[:-1], -1)


def config(family, router, kernel, dropout):
    """Experts of unequal rank in every feed-forward linear, and nothing else, so that the rest is the base's own."""
    _, _, prefix, names, _ = FAMILIES[family]
    places = ["first", "last"] if len(names) == 2 else ["first", "second", "last"]
    ranks = {prefix.format(n) + name: RANKS[p] for n in range(2) for p, name in zip(places, names, strict=True)}
    expert = {"kind": "ffn_lora", "alpha": ALPHA, "dropout": dropout}
    rule = {"targets": ["feed-forward"], "expert": expert, "kernel": kernel}
    balance = BALANCE if router in ("topk", "soft") else 0.0
    return mixora.MixoraConfig(
        rules={"ffn": {**rule, "router": {"kind": router, **ROUTERS[router][1]}}},
        losses={"load_balance": {"coefficient": balance}},
        allocation=ranks,
    )


def install(base, family, adapted, route, keep):
    """Put references in place of the base's feed-forward parts; returns them and their leaf tensors by name."""
    _, activation, prefix, names, place = FAMILIES[family]
    references, leaves = [], {}
    for n in range(2):
        sites = []
        for name in names:
            path = prefix.format(n) + name
            frozen, layer = base.get_submodule(path), adapted.get_base_model().get_submodule(path)
            tensors = {kind: t.detach().clone().requires_grad_() for kind, t in layer.parameters_of("default").items()}
            leaves |= {f"{path}.{kind}": tensor for kind, tensor in tensors.items()}
            weight = frozen.weight.T if family == "gpt2" else frozen.weight
            sites.append((weight, frozen.bias, tensors, layer.parts["default"].shape.ranks))
        references.append(Reference(sites, activation, route, keep))
        base.set_submodule(place.format(n), references[-1])
        if family == "bert":
            base.set_submodule(f"bert.encoder.layer.{n}.intermediate", nn.Identity())
    return references, leaves


def batch(family):
    labels = torch.tensor([0, 2]) if family == "bert" else IDS.masked_fill(MASK == 0, -100)
    return {"input_ids": IDS, "attention_mask": MASK, "labels": labels}


def compare(family, router, kernel, monkeypatch=None):
    make, route = FAMILIES[family][0], ROUTERS[router][0]
    keep = torch.ones(EXPERTS * MASK.numel(), 128, dtype=torch.float64)
    if monkeypatch:
        keep = (torch.rand(keep.shape, generator=torch.Generator().manual_seed(3)) >= DROP).double() / (1 - DROP)
        monkeypatch.setattr(F, "dropout", lambda x, p, *rest, **k: x * keep[: len(x), : x.shape[1]] if p == DROP else x)
    model = adapt(make(), config(family, router, kernel, DROP if monkeypatch else 0.0)).double()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(8)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (0.6 if "router" in name else 0.3))
    found = model(**batch(family))
    found.loss.backward()
    got = {name.replace("base_model.model.", ""): g for name, g in gradients(model).items()}

    base = make().double().requires_grad_(False)
    references, leaves = install(base, family, model, route, keep)
    expected = base(**batch(family))
    objective = expected.loss
    if route in (topk, soft):
        balances = [reference.balance for reference in references]
        objective = objective + BALANCE * sum(balances) / 2
        for n, balance in enumerate(balances):
            leader = model.get_base_model().get_submodule(FAMILIES[family][2].format(n) + FAMILIES[family][3][0])
            torch.testing.assert_close(leader.readings["default"]["load_balance"], balance.detach())
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-9, atol=1e-11)
    objective.backward()
    assert {name.replace(".mixora_", ".").removesuffix(".default") for name in got} == leaves.keys()
    for name, gradient in got.items():
        want = leaves[name.replace(".mixora_", ".").removesuffix(".default")].grad
        assert want.abs().max() > 1e-6, f"the reference does not test {name}"
        torch.testing.assert_close(gradient, want, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_losses_and_gradients(family, kernel):
    compare(family, "topk", kernel)


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "topk"])
def test_other_routers(router, kernel):
    compare("llama", router, kernel)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_choice_of_a_token_has_its_own_dropout(family, monkeypatch):
    compare(family, "topk", "loop", monkeypatch)
