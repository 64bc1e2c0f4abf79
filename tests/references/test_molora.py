"""MoLoRA from its formulas: y = W0 x + s sum_e softmax(W x)_e B_e A_e x, with a balance loss on mean weights."""

import pytest
import torch

from tests.references.linear import compare

EXPERTS, RANK, SCALE = 3, 2, 1.5


def reference(tokens, tensors):
    w_EI, a_RI, b_RO = tensors["router"], tensors["A"], tensors["B"]
    deltas, weights, squares = [], [], []
    for x_I in tokens:
        powers = [(w_EI[e] * x_I).sum().exp() for e in range(EXPERTS)]
        weights.append([power / sum(powers) for power in powers])
        squares.append(sum(powers).log() ** 2)
        delta = 0
        for e in range(EXPERTS):
            for r in range(e * RANK, (e + 1) * RANK):
                delta = delta + SCALE * weights[-1][e] * (a_RI[r] * x_I).sum() * b_RO[r]
        deltas.append(delta)
    mean = [sum(row[e] for row in weights) / len(tokens) for e in range(EXPERTS)]
    balance = EXPERTS * sum(p.detach() * p for p in mean)
    return deltas, balance, sum(squares) / len(tokens)


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
def test_outputs_losses_and_gradients(kernel):
    routing = compare("molora", kernel, reference, num_experts=EXPERTS, rank=RANK, scale=SCALE)
    assert torch.equal(routing.experts_TK[0], torch.arange(EXPERTS))
