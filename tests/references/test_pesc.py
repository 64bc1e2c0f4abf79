"""PESC's layer against its formulas, written out token by token in float64: outputs, losses and every gradient."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mixora
from mixora.contracts import Shape
from mixora.kernels import KERNELS
from tests.models import adapt

ROWS, LENGTH, WIDTH, INNER = 2, 5, 4, 6
EXPERTS, RANK, SCALE, DROP, BALANCE = 5, 3, 0.25, 0.3, 0.7
SHAPE = Shape(WIDTH, WIDTH, (RANK,))
EXACT = [n for n, k in KERNELS.items() if k.objection(SHAPE, torch.float64) is None and not k.joins]


class Dense(nn.Module):
    """A model that is one feed-forward part, and counts how often it runs."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
            self.runs = 0

        def forward(self, x):
            self.runs += 1
            return self.down(torch.tanh(self.up(x)))

    def __init__(self):
        super().__init__()
        self.mlp = self.Part()

    def forward(self, x, attention_mask=None):
        return self.mlp(x)


def gelu(value):
    return value * 0.5 * (1 + torch.erf(value / math.sqrt(2)))


def reference(x_TI, real, part, tensors, top_k, mask_TI):
    """y of each token (padding gets the dense output) and the balance loss of the real ones."""
    w_EI, downs, ups = tensors["router"], tensors["A"], tensors["B"]
    inner_bias, outer_bias = tensors.get("bias_A"), tensors.get("bias_B")
    outputs, probability, choices = [], [], []
    for t in range(len(x_TI)):
        f = part.down.weight @ torch.tanh(part.up.weight @ x_TI[t] + part.up.bias) + part.down.bias
        outputs.append(f)
        if not real[t]:
            continue
        logits = [(w_EI[e] * x_TI[t]).sum() for e in range(EXPERTS)]
        kept = sorted(range(EXPERTS), key=lambda e, logits=logits: -logits[e].item())[:top_k]
        whole = sum(logits[e].exp() for e in kept)
        for e in kept:
            inner = [(downs[r] * f * mask_TI[t]).sum() for r in range(e * RANK, (e + 1) * RANK)]
            if inner_bias is not None:
                inner = [h + inner_bias[e * RANK + i] for i, h in enumerate(inner)]
            expert = sum(gelu(h) * ups[e * RANK + i] for i, h in enumerate(inner))
            expert = expert if outer_bias is None else expert + outer_bias[e]
            outputs[t] = outputs[t] + SCALE * logits[e].exp() / whole * expert
        probability.append([logit.exp() / sum(other.exp() for other in logits) for logit in logits])
        choices += kept
    share = [choices.count(e) / len(choices) for e in range(EXPERTS)]
    mean = [sum(p[e] for p in probability) / len(probability) for e in range(EXPERTS)]
    return torch.stack(outputs), EXPERTS * sum(s * m for s, m in zip(share, mean, strict=True))


def config(top_k, biases, dropout, kernel):
    changes = {"num_experts": EXPERTS, "top_k": top_k, "rank": RANK, "biases": biases, "kernel": kernel}
    rules = mixora.recipe("pesc", **changes, targets=["mlp"]).rules
    rules["ffn"]["expert"]["dropout"] = DROP if dropout else 0.0
    return mixora.MixoraConfig(rules={"ffn": rules["ffn"]}, losses={"load_balance": {"coefficient": BALANCE}})


@pytest.mark.parametrize("kernel", EXACT)
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("biases", "dropout"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
def test_outputs_losses_and_gradients(monkeypatch, top_k, biases, dropout, padded, kernel):
    generator = torch.Generator().manual_seed(top_k)
    keep_TI = (torch.rand(ROWS * LENGTH, WIDTH, generator=generator) >= DROP) / (1 - DROP)
    monkeypatch.setattr(F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * keep_TI if p else x)
    model = adapt(Dense(), config(top_k, biases, dropout, kernel)).double()
    layer = model.base_model.model.mlp
    tensors = layer.parameters_of("default")
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    x_BSI = torch.randn(ROWS, LENGTH, WIDTH, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_BS = torch.ones(ROWS, LENGTH)
    if padded:
        mask_BS[0, :2], mask_BS[1, 4:] = 0, 0
    upstream_TO = torch.randn(ROWS * LENGTH, WIDTH, generator=generator, dtype=torch.float64)
    leaves = [x_BSI, *tensors.values()]
    # the layer adds its auxiliary gradient in backward
    y_TO = model(x_BSI, attention_mask=mask_BS).flatten(0, 1)
    found = torch.autograd.grad((y_TO * upstream_TO).sum(), leaves)
    assert layer.base_layer.runs == 1

    leaf_TI = x_BSI.detach().flatten(0, 1).requires_grad_()
    mask_TI = keep_TI if dropout else torch.ones_like(keep_TI)
    real = mask_BS.flatten().bool()
    want_TO, balance = reference(leaf_TI, real, layer.base_layer, tensors, top_k, mask_TI)
    objective = (want_TO * upstream_TO).sum() + BALANCE * balance
    expected = torch.autograd.grad(objective, [leaf_TI, *leaves[1:]])
    torch.testing.assert_close(y_TO, want_TO, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.readings["default"]["load_balance"], balance.detach())
    for name, got, want in zip(("x", *tensors), found, expected, strict=True):
        torch.testing.assert_close(
            got, want.reshape(got.shape), rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"gradient of {n}: {m}"
        )
