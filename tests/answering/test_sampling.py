"""Draws follow the softmax, and depend on nothing but the seed and the logits of their answer."""

import math

import pytest
import torch
from scipy.stats import chisquare

from mixora.answering.sampling import Sampler, Sampling

LOGITS = torch.tensor([2.0, 0.5, -1.0, 1.0, 0.0])


def draw(count, **settings):
    sampler = Sampler(Sampling(1, **settings))
    return [sampler.choose(LOGITS).token for _ in range(count)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature):
    counts = torch.bincount(torch.tensor(draw(4000, temperature=temperature, seed=1)), minlength=5)
    weights = [math.exp(float(z) / temperature) for z in LOGITS]
    assert chisquare(counts.tolist(), [4000 * w / sum(weights) for w in weights]).pvalue > 0.001


def test_top_p_draws_among_the_likeliest_that_reach_it():
    # 0.579, 0.129, 0.029, 0.213, 0.078
    assert set(draw(300, temperature=1.0, top_p=0.75, seed=1)) == {0, 3}
    assert set(draw(300, temperature=1.0, top_p=0.80, seed=1)) == {0, 1, 3}
    assert set(draw(50, temperature=1.0, top_p=1e-9, seed=1)) == {0}


def test_a_seed_gives_the_same_draws_and_another_one_others():
    assert draw(50, temperature=1.0, seed=7) == draw(50, temperature=1.0, seed=7)
    assert draw(50, temperature=1.0, seed=7) != draw(50, temperature=1.0, seed=8)
    assert draw(50, temperature=1.0) != draw(50, temperature=1.0)


def test_temperature_0_and_nearly_0_take_the_likeliest():
    assert set(draw(5)) == set(draw(5, temperature=5e-324)) == {0}


def test_log_probabilities_are_the_models_own():
    choice = Sampler(Sampling(1, temperature=2.0, top_p=0.1, seed=1, top_logprobs=2)).choose(LOGITS)
    total = math.log(sum(math.exp(float(z)) for z in LOGITS))
    assert choice.token == 0 and choice.logprob == pytest.approx(2.0 - total)
    assert [token for token, _ in choice.top] == [0, 3]
    assert choice.top[1][1] == pytest.approx(1.0 - total)
    impossible = Sampler(Sampling(1, top_logprobs=2)).choose(torch.tensor([0.0, -math.inf]))
    assert impossible.top == ((0, 0.0), (1, -9999.0))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_an_error(value):
    with pytest.raises(ArithmeticError, match="NaN or infinite"):
        Sampler(Sampling(1)).choose(torch.tensor([0.0, value]))
