"""Pairs of thin matrices against dense ones."""

import numpy as np
import pytest
import torch

from mixora.mixture.low_rank import LowRank


def pair(rank, in_features=7, out_features=5, scale=2.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(rank, n, generator=generator) for n in (in_features, out_features))
    return LowRank(a, b, scale)


def test_the_change_and_what_it_does_to_an_input():
    one, x = pair(3), torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1))
    expected = 2.5 * np.einsum("ro,ri,bti->bto", one.B_rO.numpy(), one.A_rI.numpy(), x.numpy())
    np.testing.assert_allclose(one.apply(x), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x @ one.delta_OI().T, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(("in_features", "out_features"), [(7, 5), (5, 9), (3, 8)])
def test_truncation_is_that_of_the_dense_singular_values(rank, in_features, out_features):
    whole = pair(4, in_features, out_features)
    dense = whole.delta_OI().double().numpy()
    left, values, right = np.linalg.svd(dense)
    nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
    cut, error = whole.truncate(rank)
    assert (cut.rank, cut.scale, cut.A_rI.dtype) == (rank, 2.5, torch.float32)
    np.testing.assert_allclose(cut.delta_OI(), nearest, atol=1e-5)
    np.testing.assert_allclose(error, np.linalg.norm(dense - nearest) / np.linalg.norm(dense), atol=1e-6)


def test_rows_of_zeros_change_nothing():
    one = pair(2)
    filled = one.pad(5)
    assert (filled.rank, filled.scale) == (5, one.scale) and one.pad(2).rank == 2
    assert not filled.A_rI[2:].any() and not filled.B_rO[2:].any()
    torch.testing.assert_close(filled.delta_OI(), one.delta_OI(), rtol=0, atol=0)


def test_no_truncation_where_the_rank_suffices():
    whole = pair(3)
    assert whole.truncate(3) == (whole, 0.0)
    assert whole.truncate(8)[0] is whole


def test_no_change_has_no_error():
    cut, error = LowRank(torch.ones(3, 4), torch.zeros(3, 5)).truncate(1)
    assert error == 0 and (cut.delta_OI() == 0).all()
