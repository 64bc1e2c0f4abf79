"""SiRA against its formulas, written out token by token in float64: outputs, auxiliary losses and every gradient."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from torch.nn import functional as F

import mixora
from mixora.passes import tracing
from tests.models import OneLinear, adapt

ROWS, LENGTH, IN, OUT = 2, 7, 5, 6
EXPERTS, TOP_K, RANK, DROP = 4, 2, 3, 0.4
FACTOR, LEAST = "0.6", 1
BALANCE, Z = 0.7, 0.05


FLAGS = (("token", "choice", "priority"), (True, False), ("sequence", "batch"), (False, True), (False, True))
# priority among renormalised weights stands apart in tests/routers/test_capacity.py
FORMS = [form for form in itertools.product(*FLAGS) if not (form[0] == "priority" and form[3])]


def config(order, count_slots, group, renormalise, dropout):
    capacity = {"admission": order, "count_slots": count_slots, "group": group}
    capacity |= {"capacity_factor": float(FACTOR), "min_capacity": LEAST}
    return mixora.recipe(
        "sira",
        targets=["proj"],
        num_experts=EXPERTS,
        top_k=TOP_K,
        rank=RANK,
        scale=1.0,
        renormalise=renormalise,
        expert_dropout=DROP if dropout else 0.0,
        **{f"rules.attention.router.capacity.{name}": value for name, value in capacity.items()},
        **{"losses.load_balance.coefficient": BALANCE, "losses.z_loss.coefficient": Z},
    )


def places(size, count_slots):
    share = Fraction(FACTOR) * size / EXPERTS
    return max(LEAST, math.ceil(share * TOP_K) if count_slots else round(share))


def admit(chosen, sequence_of, order, count_slots, group):
    """The admitted ones of `chosen`, a list of (token, slot, expert, probability), as a set of (token, slot)."""
    by_order = {"token": lambda c: (c[0], c[1]), "choice": lambda c: (c[1], c[0]), "priority": lambda c: -c[3]}
    taken, admitted = {}, set()
    for token, slot, expert, _ in sorted(chosen, key=by_order[order]):
        line = sequence_of[token] if group == "sequence" else 0
        size = sum(1 for s in sequence_of.values() if group == "batch" or s == line)
        if taken.setdefault((line, expert), 0) < places(size, count_slots):
            taken[line, expert] += 1
            admitted.add((token, slot))
    return admitted


def reference(x_TI, real, base, tensors, mask_TE, order, count_slots, group, renormalise, dropout):
    """y of every real token, the balance loss and the z-loss; differentiable by autograd through plain steps."""
    w_EI, a_RI, b_RO = tensors["router"], tensors["A"], tensors["B"]
    sequence_of = {t: t // LENGTH for t in range(ROWS * LENGTH) if real[t]}
    probability, kept, chosen = {}, {}, []
    for t in sequence_of:
        logits = [(w_EI[e] * x_TI[t]).sum() for e in range(EXPERTS)]
        powers = [logit.exp() for logit in logits]
        probability[t] = [power / sum(powers) for power in powers]
        kept[t] = [p * mask_TE[t, e].item() / (1 - DROP) if dropout else p for e, p in enumerate(probability[t])]
        value = [p.item() for p in kept[t]]
        best = sorted(range(EXPERTS), key=lambda e, value=value: -value[e])[:TOP_K]
        chosen += [(t, k, e, value[e]) for k, e in enumerate(best) if value[e] > 0]
    admitted = admit(chosen, sequence_of, order, count_slots, group)
    delta = {t: torch.zeros(OUT, dtype=torch.float64) for t in sequence_of}
    for t, k, e, _ in chosen:
        whole = sum(kept[t][other] for token, _, other, _ in chosen if token == t) if renormalise else 1
        if (t, k) in admitted:
            rank = range(e * RANK, (e + 1) * RANK)
            delta[t] = delta[t] + kept[t][e] / whole * sum((a_RI[r] * x_TI[t]).sum() * b_RO[r] for r in rank)
    y = {t: base.weight.detach() @ x_TI[t] + base.bias.detach() + delta[t] for t in sequence_of}
    count = len(sequence_of)
    share = [sum(c[2] == e for c in chosen) / len(chosen) for e in range(EXPERTS)]
    mean = [sum(probability[t][e] for t in sequence_of) / count for e in range(EXPERTS)]
    balance = EXPERTS * sum(f * p for f, p in zip(share, mean, strict=True))
    z = sum(torch.logsumexp(w_EI @ x_TI[t], dim=0) ** 2 for t in sequence_of) / count
    return y, balance, z


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
@pytest.mark.parametrize(("order", "count_slots", "group", "renormalise", "dropout"), FORMS)
def test_outputs_losses_and_gradients(monkeypatch, order, count_slots, group, renormalise, dropout, padded):
    form = (order, count_slots, group, renormalise, dropout)
    generator = torch.Generator().manual_seed(sum(map(len, map(str, form))))
    mask_TE = torch.rand(ROWS * LENGTH, EXPERTS, generator=generator) >= DROP
    monkeypatch.setattr(
        F, "dropout", lambda x, p=0.5, training=True, inplace=False: x * mask_TE / (1 - p) if training and p else x
    )
    model = adapt(OneLinear(IN, OUT), config(*form)).double()
    layer = model.base_model.model.proj
    tensors = layer.parameters_of("default")
    with torch.no_grad():
        tensors["router"].copy_(torch.randn(EXPERTS, IN, generator=generator, dtype=torch.float64))
    x_BSI = torch.randn(ROWS, LENGTH, IN, generator=generator, dtype=torch.float64, requires_grad=True)
    mask_BS = torch.ones(ROWS, LENGTH)
    if padded:
        mask_BS[0, :2], mask_BS[1, 4:] = 0, 0
    real = mask_BS.flatten().bool()
    upstream_TO = torch.randn(ROWS * LENGTH, OUT, generator=generator, dtype=torch.float64) * real[:, None]
    leaves = [x_BSI, tensors["A"], tensors["B"], tensors["router"]]

    # the layer adds its auxiliary gradient in backward; the readings are the terms without coefficient
    y_BSO = model(x_BSI, attention_mask=mask_BS)
    found = torch.autograd.grad((y_BSO.flatten(0, 1) * upstream_TO).sum(), leaves)

    leaf_TI = x_BSI.detach().flatten(0, 1).requires_grad_()
    y, balance, z = reference(leaf_TI, real, layer.base_layer, tensors, mask_TE, *form)
    objective = sum((y[t] * upstream_TO[t]).sum() for t in y) + BALANCE * balance + Z * z
    expected = torch.autograd.grad(objective, [leaf_TI, *leaves[1:]])

    for t, y_O in y.items():
        torch.testing.assert_close(y_BSO.flatten(0, 1)[t], y_O, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(layer.readings["default"]["load_balance"], balance.detach())
    torch.testing.assert_close(layer.readings["default"]["z_loss"], z.detach())
    for name, got, want in zip(("x", "A", "B", "router"), found, expected, strict=True):
        want = want.reshape(got.shape)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"gradient of {n}: {m}")


def test_the_cases_above_do_drop_assignments():
    """Otherwise the limit would not be tested."""
    model = adapt(OneLinear(IN, OUT), config("token", True, "sequence", False, False))
    with tracing() as trace:
        model(torch.randn(ROWS, LENGTH, IN))
    (routing,) = trace.of("proj")
    assert 0 < routing.admitted_TK.sum() < routing.assigned_TK.sum()
