"""HiLo's layer against its formula, token by token in float64, with unequal ranks at one site: values and gradients.

p = softmax(W x);  w = p on the two largest, divided by their sum;  y = W0 x + b + 2 sum w_e B_e A_e x
"""

import pytest
import torch

import mixora
from tests.models import OneLinear, adapt

ROWS, LENGTH, IN, OUT = 2, 6, 7, 5
RANKS = [3, 1, 2, 4]
COEFFICIENT = 0.3


def build(kernel):
    config = mixora.recipe(
        "hilo",
        targets=["proj"],
        num_experts=4,
        rank=2,
        kernel=kernel,
        dropout=0.0,
        allocation={"proj": RANKS},
        **{"losses.load_balance.coefficient": COEFFICIENT},
    )
    model = adapt(OneLinear(IN, OUT), config).double()
    layer = model.base_model.model.proj
    tensors = layer.parameters_of("default")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        tensors["router"].copy_(torch.randn(4, IN, generator=generator, dtype=torch.float64))
    return model, layer, tensors, generator


def reference(x_TI, real, base, a_RI, b_RO, w_EI):
    """Outputs of all tokens, and the balance loss E sum_e f_e P_e over the real ones."""
    rows, counts, mass = [], [0] * 4, [0.0] * 4
    for t in range(len(x_TI)):
        exps = [(w_EI[e] * x_TI[t]).sum().exp() for e in range(4)]
        probs = [one / sum(exps) for one in exps]
        first, second = sorted(range(4), key=lambda e: -probs[e].item())[:2]
        y_O = base.weight @ x_TI[t] + base.bias
        for e in (first, second) if real[t] else ():
            begin = sum(RANKS[:e])
            weight = probs[e] / (probs[first] + probs[second])
            for r in range(begin, begin + RANKS[e]):
                y_O = y_O + 2.0 * weight * (a_RI[r] * x_TI[t]).sum() * b_RO[r]
            counts[e] += 1
        if real[t]:
            mass = [m + p for m, p in zip(mass, probs, strict=True)]
        rows.append(y_O)
    tokens = sum(real)
    balance = 4 * sum((c / (2 * tokens)) * (m / tokens) for c, m in zip(counts, mass, strict=True))
    return torch.stack(rows), balance


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
def test_outputs_loss_and_every_gradient(kernel, padded):
    model, layer, tensors, generator = build(kernel)
    assert tensors["A"].shape == (10, IN) and tensors["B"].shape == (10, OUT)
    x_BSI = torch.randn(ROWS, LENGTH, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_BS = torch.ones(ROWS, LENGTH)
    if padded:
        mask_BS[0, :2] = 0
    upstream_TO = torch.randn(ROWS * LENGTH, OUT, generator=generator, dtype=torch.float64)
    leaves = [tensors["A"], tensors["B"], tensors["router"]]
    y_TO = model(x_BSI, attention_mask=mask_BS).flatten(0, 1)
    found = torch.autograd.grad((y_TO * upstream_TO).sum(), [x_BSI, *leaves])

    x_TI = x_BSI.detach().flatten(0, 1).requires_grad_()
    real = mask_BS.flatten().bool().tolist()
    want_TO, balance = reference(x_TI, real, layer.base_layer, *leaves)
    expected = torch.autograd.grad((want_TO * upstream_TO).sum() + COEFFICIENT * balance, [x_TI, *leaves])
    torch.testing.assert_close(y_TO, want_TO, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(layer.readings["default"]["load_balance"], balance.detach())
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want.reshape(got.shape), rtol=1e-10, atol=1e-12)
