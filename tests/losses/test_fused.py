"""The fused loss against straight-line float64 and transformers' own functions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from mixora.errors import TrainingError
from mixora.losses import fused as fused_loss
from mixora.losses.fused import cross_entropy, cross_entropy_and_agreement

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def make(tokens, width=7, vocabulary=13, dtype=torch.float32, seed=0, ignored=0.3, with_bias=True):
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(tokens, width, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype) for shape in ((vocabulary, width), (vocabulary,))
    )
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return first, second, weight, bias if with_bias else None, labels


def expected(first, second, weight, bias, labels, smoothing):
    """Both sums in float64, from the formulas; the hidden states as leaves."""
    first, second = (hidden.detach().double().requires_grad_() for hidden in (first, second))
    kept = labels != -100
    logits = [hidden[kept] @ weight.double().T + (0 if bias is None else bias.double()) for hidden in (first, second)]
    p, q = (x.softmax(-1) for x in logits)
    wanted = (1 - smoothing) * F.one_hot(labels[kept], weight.shape[0]).double() + smoothing / weight.shape[0]
    task = -(wanted * p.log()).sum()
    agreement = (q.detach() * (q.detach() / p).log() + p.detach() * (p.detach() / q).log()).sum() / 2
    return first, second, task, agreement


def assert_close(got, want, dtype, weight=1.0):
    """To rounding of terms of the size of `weight`, which may cancel."""
    scale = max(1.0, weight, want.abs().max().item() if want.numel() else 0.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=TOLERANCE[dtype] * scale)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(0, 12),
    vocabulary=st.integers(1, 20),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    with_bias=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    weights=st.tuples(st.sampled_from([0.0, 1.0, -2.5]), st.sampled_from([0.0, 1.0, 80.0])),
    dtype=st.sampled_from(list(TOLERANCE)),
    chunk=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients(tokens, vocabulary, ignored, with_bias, smoothing, weights, dtype, chunk, seed):
    first, second, *rest = make(tokens, 7, vocabulary, dtype, seed, ignored, with_bias)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_loss, "CHUNK", chunk)
        task, agreement = cross_entropy_and_agreement(first, second, *swap(rest), smoothing)
        alone = cross_entropy(first, *swap(rest), smoothing)
    assert task.dtype == agreement.dtype == torch.promote_types(dtype, torch.float32)
    *leaves, want_task, want_agreement = expected(first, second, *rest, smoothing)
    assert_close(task.detach(), want_task.detach(), dtype)
    assert_close(alone.detach(), want_task.detach(), dtype)
    assert_close(agreement.detach(), want_agreement.detach(), dtype)
    got = torch.autograd.grad(weights[0] * task + weights[1] * agreement, (first, second))
    want = torch.autograd.grad(weights[0] * want_task + weights[1] * want_agreement, leaves)
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == dtype
        assert_close(ours, theirs, dtype, weight=weights[1])
    (of_task,) = torch.autograd.grad(alone, first)
    leaf, _, want_task, _ = expected(first, second, *rest, smoothing)
    assert_close(of_task, torch.autograd.grad(want_task, leaf)[0], dtype)


def swap(rest):
    """weight, bias, labels in the order of the function: weight, labels, bias."""
    weight, bias, labels = rest
    return weight, labels, bias


def test_bf16():
    first, second, weight, bias, labels = make(300, 64, 500, torch.bfloat16)
    weight = weight / 8
    sums = cross_entropy_and_agreement(first, second, weight, labels, bias, 0.1)
    *leaves, want_task, want_agreement = expected(first, second, weight, bias, labels, 0.1)
    assert [s.dtype for s in sums] == [torch.float32, torch.float32]
    for got, want in zip(sums, (want_task, want_agreement), strict=True):
        assert abs(got.item() / want.item() - 1) < 2e-3
        ours = torch.autograd.grad(got, (first, second), allow_unused=True, retain_graph=True)
        theirs = torch.autograd.grad(want, leaves, allow_unused=True, retain_graph=True)
        for mine, exact in zip(ours, theirs, strict=True):
            assert (mine is None) == (exact is None)
            assert mine is None or (mine.double() - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("used", [0, 1])
def test_one_sum_alone_can_be_differentiated(used):
    first, second, *rest = make(9)
    sums = cross_entropy_and_agreement(first, second, *swap(rest))
    got = torch.autograd.grad(sums[used], (first, second), allow_unused=True)
    *leaves, task, agreement = expected(first, second, *rest, 0.0)
    want = torch.autograd.grad((task, agreement)[used], leaves, allow_unused=True)
    assert_close(got[0], want[0], torch.float32)
    assert got[1] is None if used == 0 else torch.allclose(got[1].double(), want[1], atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.1, 0.0])
def test_smoothing_is_that_of_transformers(smoothing):
    first, _, weight, bias, labels = make(20)
    logits = F.linear(first, weight, bias)
    want = LabelSmoother(epsilon=smoothing)({"logits": logits}, labels, num_items_in_batch=1)
    got = cross_entropy(first, weight, labels, bias, smoothing)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(loss, first)[0] for loss in (got, want)))


def test_autocast_computes_as_the_head_would():
    first, _, weight, bias, labels = make(30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, logits = cross_entropy(first, weight, labels, bias), F.linear(first, weight, bias)
        assert logits.dtype == torch.bfloat16
        want = F.cross_entropy(logits.float(), labels, reduction="sum")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
    ours, theirs = (torch.autograd.grad(loss, first)[0] for loss in (got, want))
    assert (ours - theirs).norm() < 5e-3 * theirs.norm()


def test_without_gradients_none_is_made():
    first, second, *rest = make(9)
    with torch.no_grad():
        task, agreement = cross_entropy_and_agreement(first, second, *swap(rest))
    assert not task.requires_grad
    assert not agreement.requires_grad
    assert not cross_entropy(first.detach(), *swap(rest)).requires_grad


def test_gradients_accumulate_over_kept_graphs():
    first, _, *rest = make(9)
    loss = cross_entropy(first, *swap(rest))
    loss.backward(retain_graph=True)
    once = first.grad.clone()
    loss.backward()
    torch.testing.assert_close(first.grad, 2 * once)


def test_a_second_derivative_is_refused():
    first, _, *rest = make(4)
    with pytest.raises(TrainingError, match=r"no second derivative; valid: create_graph=False"):
        torch.autograd.grad(cross_entropy(first, *swap(rest)), first, create_graph=True)


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_trained_head_is_refused(trained):
    first, _, weight, bias, labels = make(4)
    {"weight": weight, "bias": bias}[trained].requires_grad_()
    with pytest.raises(TrainingError, match=r"the head is trained, and would get no gradient; valid: a frozen head"):
        cross_entropy(first, weight, labels, bias)


class Largest(TorchDispatchMode):
    """How many numbers the largest result of an operation holds."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


def test_the_whole_logits_never_exist():
    tokens, vocabulary = 3 * fused_loss.CHUNK, 100
    first, second, *rest = make(tokens, 7, vocabulary, ignored=0.0)
    with Largest() as largest:
        task, agreement = cross_entropy_and_agreement(first, second, *swap(rest), 0.1)
        (task + agreement).backward()
    assert largest.numbers == 2 * fused_loss.CHUNK * vocabulary


def test_unsupervised_tokens_cost_nothing():
    first, _, weight, bias, labels = make(40, ignored=0.0)
    labels[3:] = -100
    with Largest() as largest:
        cross_entropy(first, weight, labels, bias).backward()
    assert largest.numbers == first.numel() > 3 * weight.shape[0]
