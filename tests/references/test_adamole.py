"""AdaMoLE from its formulas: experts with p_e above tau(x) = sigmoid(w x + b) / E, weights proportional to p - tau."""

import pytest

from tests.references.linear import compare

EXPERTS, RANK, SCALE = 4, 2, 1.5


def reference(tokens, tensors):
    w_EI, a_RI, b_RO = tensors["router"], tensors["A"], tensors["B"]
    deltas, probability, choices, squares = [], [], [], []
    for x_I in tokens:
        powers = [(w_EI[e] * x_I).sum().exp() for e in range(EXPERTS)]
        p = [power / sum(powers) for power in powers]
        height = (tensors["router_threshold"][0] * x_I).sum() + tensors["router_threshold_bias"][0]
        tau = 1 / EXPERTS / (1 + (-height).exp())
        kept = [e for e in range(EXPERTS) if p[e].item() >= tau.item()]
        whole = sum(p[e] - tau for e in kept)
        delta = 0
        for e in kept:
            for r in range(e * RANK, (e + 1) * RANK):
                delta = delta + SCALE * (p[e] - tau) / whole * (a_RI[r] * x_I).sum() * b_RO[r]
        deltas.append(delta)
        probability.append(p)
        choices += kept
        squares.append(sum(powers).log() ** 2)
    mean = [sum(p[e] for p in probability) / len(tokens) for e in range(EXPERTS)]
    balance = EXPERTS * sum(choices.count(e) / len(choices) * mean[e] for e in range(EXPERTS))
    return deltas, balance, sum(squares) / len(tokens)


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_outputs_losses_and_gradients(kernel, seed):
    routing = compare("adamole", kernel, reference, seed, num_experts=EXPERTS, rank=RANK, scale=SCALE)
    numbers = set(routing.assigned_TK.sum(dim=1)[routing.valid_T].tolist())
    assert len(numbers) > 1, "every token has the same number of experts"
