"""HydraLoRA from its formulas: y = W0 x + s sum_e softmax(W x)_e B_e A x, one A for all experts."""

import pytest
import torch

from tests.references.linear import compare

EXPERTS, RANK, SCALE = 3, 2, 1.5


def reference(tokens, tensors):
    w_EI, a_rI, b_RO = tensors["router"], tensors["A"], tensors["B"]
    assert (tuple(a_rI.shape), tuple(b_RO.shape)) == ((2, 5), (6, 6))
    deltas, weights, squares = [], [], []
    for x_I in tokens:
        hidden = [(a_rI[r] * x_I).sum() for r in range(RANK)]
        logits = torch.stack([(w_EI[e] * x_I).sum() for e in range(EXPERTS)])
        weights.append(logits.exp() / logits.exp().sum())
        squares.append(logits.exp().sum().log() ** 2)
        deltas.append(
            SCALE * sum(weights[-1][e] * hidden[r] * b_RO[e * RANK + r] for e in range(EXPERTS) for r in range(RANK))
        )
    mean_E = sum(weights) / len(tokens)
    return deltas, EXPERTS * (mean_E.detach() * mean_E).sum(), sum(squares) / len(tokens)


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
def test_outputs_losses_and_gradients(kernel):
    compare("hydralora", kernel, reference, num_experts=EXPERTS, rank=RANK, scale=SCALE)
