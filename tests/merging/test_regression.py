"""Reduced-rank regression against dense least squares."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mixora.merging.regression import Inputs, Outputs


def solve(x, delta, b, rank, pieces=1):
    """The pair and its error, from sums over `pieces` of the tokens."""
    inputs, outputs = Inputs(torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)), Outputs.of(b, x.shape[1])
    for some_x, some_delta in zip(x.chunk(pieces), delta.chunk(pieces), strict=True):
        inputs.add(some_x)
        outputs.add(some_delta, some_x)
    pair, error = outputs.fit(inputs.whiten(), rank)
    return pair.delta_OI().numpy(), error


def draw(tokens, in_features, out_features, rank_sum, seed):
    """Inputs, and outputs in the span of `rank_sum` rows that no linear map gives."""
    generator = torch.Generator().manual_seed(seed)
    x, b, c = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((tokens, in_features), (rank_sum, out_features), (tokens, rank_sum))
    )
    return x, (c + torch.tanh(x @ torch.randn(in_features, rank_sum, generator=generator).double())) @ b, b


def test_full_rank_is_least_squares():
    x, delta, b = draw(40, 6, 5, 8, seed=0)
    found, error = solve(x, delta, b, rank=5, pieces=3)
    expected, squares, *_ = np.linalg.lstsq(x.numpy(), delta.numpy(), rcond=None)
    np.testing.assert_allclose(found.T, expected, atol=1e-10)
    np.testing.assert_allclose(error, np.sqrt(squares.sum()) / np.linalg.norm(delta.numpy()), rtol=1e-10)


def test_with_too_few_tokens_it_is_the_least_norm_solution():
    x, delta, b = draw(4, 9, 5, 3, seed=1)
    x = torch.cat([x, x[:2]])
    delta = torch.cat([delta, delta[:2]])
    found, error = solve(x, delta, b, rank=3)
    np.testing.assert_allclose(found.T, np.linalg.pinv(x.numpy()) @ delta.numpy(), atol=1e-9)
    assert error < 1e-7


def test_no_tokens_or_no_change_give_zero():
    x, _, b = draw(6, 4, 5, 3, seed=2)
    found, error = solve(x, torch.zeros(6, 5, dtype=torch.float64), b, rank=2)
    assert error == 0 and (found == 0).all()
    found, error = solve(x[:0], torch.zeros(0, 5, dtype=torch.float64), b, rank=2)
    assert error == 0 and (found == 0).all()


def residual(x, delta, map_OI):
    return np.linalg.norm(delta.numpy() - x.numpy() @ map_OI.T)


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 3),
    in_features=st.integers(3, 8),
    out_features=st.integers(3, 8),
    rank_sum=st.integers(3, 10),
    seed=st.integers(0, 2**20),
)
def test_no_other_map_of_the_rank_is_nearer(rank, in_features, out_features, rank_sum, seed):
    x, delta, b = draw(30, in_features, out_features, rank_sum, seed)
    found, error = solve(x, delta, b, rank)
    least = residual(x, delta, found)
    np.testing.assert_allclose(error * np.linalg.norm(delta.numpy()), least, rtol=1e-6)
    assert np.linalg.matrix_rank(found, tol=1e-8) <= rank
    generator = np.random.default_rng(seed)
    left, values, right = np.linalg.svd(found, full_matrices=False)
    for size in (1e-3, 1e-1, 1.0):
        nudged_left = (left * values)[:, :rank] + size * generator.normal(size=(out_features, rank))
        nudged_right = right[:rank] + size * generator.normal(size=(rank, in_features))
        assert residual(x, delta, nudged_left @ nudged_right) >= least * (1 - 1e-9)
    # nor the least-squares map, cut without regard to the inputs
    dense = np.linalg.lstsq(x.numpy(), delta.numpy(), rcond=None)[0].T
    left, values, right = np.linalg.svd(dense, full_matrices=False)
    assert residual(x, delta, (left[:, :rank] * values[:rank]) @ right[:rank]) >= least * (1 - 1e-9)
