"""AdaMoE from its formulas: top-k among experts and null experts, weights of the real ones renormalised."""

import pytest

from tests.references.linear import compare

EXPERTS, RANK, SCALE = 3, 2, 1.5


def reference_of(nulls, top_k):
    columns = EXPERTS + nulls

    def reference(tokens, tensors):
        w_CI, a_RI, b_RO = tensors["router"], tensors["A"], tensors["B"]
        deltas, probability, choices, squares = [], [], [], []
        for x_I in tokens:
            powers = [(w_CI[c] * x_I).sum().exp() for c in range(columns)]
            p = [power / sum(powers) for power in powers]
            best = sorted(range(columns), key=lambda c, p=p: -p[c].item())[:top_k]
            real = [c for c in best if c < EXPERTS]
            delta = 0 * x_I.sum()
            for e in real:
                weight = p[e] / sum(p[other] for other in real)
                for r in range(e * RANK, (e + 1) * RANK):
                    delta = delta + SCALE * weight * (a_RI[r] * x_I).sum() * b_RO[r]
            deltas.append(delta)
            probability.append(p)
            choices += best
            squares.append(sum(powers).log() ** 2)
        of_nulls = sum(c >= EXPERTS for c in choices) / nulls
        share = [(choices.count(c) if c < EXPERTS else of_nulls) / len(choices) for c in range(columns)]
        mean = [sum(p[c] for p in probability) / len(tokens) for c in range(columns)]
        balance = columns * sum(f * q for f, q in zip(share, mean, strict=True))
        return deltas, balance, sum(squares) / len(tokens)

    return reference


@pytest.mark.parametrize("kernel", ["loop", "stacked", "sorted"])
@pytest.mark.parametrize(("nulls", "top_k"), [(2, 2), (3, 3), (1, 2), (4, 5), (2, 5)])
def test_outputs_losses_and_gradients(kernel, nulls, top_k):
    sizes = {"num_experts": EXPERTS, "null_experts": nulls, "top_k": top_k, "rank": RANK, "scale": SCALE}
    routing = compare("adamoe", kernel, reference_of(nulls, top_k), **sizes)
    real_T = routing.assigned_TK.sum(dim=1)[routing.valid_T]
    nulls_T = routing.null_slots_T[routing.valid_T]
    assert (real_T + nulls_T == top_k).all()
    assert nulls_T.any()
    assert (routing.null_slots_T[~routing.valid_T] == 0).all()
