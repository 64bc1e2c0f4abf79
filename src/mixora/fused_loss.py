"""Cross entropy behind a frozen language-model head, some tokens at a time: [tokens, vocabulary] never exists.

Where the head is frozen, only the hidden states want a gradient. It is made beside the loss, while a chunk's logits are
there, and scaled in backward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixora.errors import TrainingError

IGNORED = -100
CHUNK = 128
"""Tokens at a time: fastest in bf16; fp32 gains a little from more, at more memory (benchmarks/fused_loss.py)."""


def cross_entropy(
    hidden_TI: Tensor,
    weight_VI: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The cross entropy of `labels_T` under softmax(hidden W^T + bias), summed over the tokens not labelled -100.

    `smoothing`: the share of each label that is spread over the vocabulary, as in transformers' `LabelSmoother`.
    `dtype`: what the products are computed in; by default as `F.linear` would here, autocast included. All else is
    fp32 (fp64 for fp64). Returns a scalar of that dtype with its graph to `hidden_TI`, 0 where no token is supervised.
    Raises `TrainingError` where weight or bias want a gradient, and when differentiated twice.
    """
    task, _ = _sums(hidden_TI, None, weight_VI, labels_T, bias_V, smoothing, dtype)
    return task


def cross_entropy_and_agreement(
    first_TI: Tensor,
    second_TI: Tensor,
    weight_VI: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None = None,
    smoothing: float = 0.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy` of the first pass, and how far the second one's distributions q are from its p (AdaMix, eq. 5).

    The latter is 1/2 [KL(sg(q) || p) + KL(sg(p) || q)], sg stopping the gradient, summed over the same tokens.
    """
    return _sums(first_TI, second_TI, weight_VI, labels_T, bias_V, smoothing, dtype)


def product_dtype(weight: Tensor) -> torch.dtype:
    """What `F.linear` with `weight` computes in here and now."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _sums(
    first_TI: Tensor,
    second_TI: Tensor | None,
    weight_VI: Tensor,
    labels_T: Tensor,
    bias_V: Tensor | None,
    smoothing: float,
    dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    if weight_VI.requires_grad or (bias_V is not None and bias_V.requires_grad):
        raise TrainingError("fused loss: the head is trained, and would get no gradient; valid: a frozen head")
    dtype = dtype or product_dtype(weight_VI)
    head = _Head(weight_VI.to(dtype), None if bias_V is None else bias_V.to(dtype), smoothing)
    wanted = torch.is_grad_enabled() and any(h is not None and h.requires_grad for h in (first_TI, second_TI))
    with torch.autocast(first_TI.device.type, enabled=False):
        return _Sums.apply(first_TI, second_TI, head, labels_T, wanted)


@dataclass(frozen=True)
class _Head:
    """A frozen head whose labels are smoothed; weight and bias in the dtype of its products."""

    weight_VI: Tensor
    bias_V: Tensor | None
    smoothing: float

    def put_gradient(self, into_TI: Tensor | None, rows_C: Tensor, of_logits_CV: Tensor) -> None:
        if into_TI is not None:
            into_TI[rows_C] = (of_logits_CV.to(self.weight_VI.dtype) @ self.weight_VI).to(into_TI.dtype)


class _Logits:
    """Room for the logits of a chunk, in at least fp32, that is used again for the next one: fresh memory costs more.

    On a CPU products in low precision are about twice as fast transposed, [V, C].
    """

    def __init__(self, head: _Head, hidden_TI: Tensor, most: int) -> None:
        self.head, weight_VI = head, head.weight_VI
        dtype = torch.promote_types(torch.promote_types(hidden_TI.dtype, weight_VI.dtype), torch.float32)
        self.is_flipped = weight_VI.itemsize < 4 and weight_VI.device.type == "cpu"
        size = (len(weight_VI), most) if self.is_flipped else (most, len(weight_VI))
        self.product = weight_VI.new_empty(size)
        self.wide = self.product if dtype == weight_VI.dtype else weight_VI.new_empty(size, dtype=dtype)

    def cut(self, whole: Tensor, count: int) -> Tensor:
        """The part of such room that `count` tokens need: [C, V]."""
        return whole[:, :count].T if self.is_flipped else whole[:count]

    def fill(self, x_CI: Tensor) -> Tensor:
        """The logits of a chunk, less the largest of each token: [C, V]."""
        weight_VI, bias_V, count = self.head.weight_VI, self.head.bias_V, len(x_CI)
        x_CI = x_CI.to(weight_VI.dtype)
        if self.is_flipped:
            product, wide = self.product[:, :count], self.wide[:, :count]
            factors, bias = (weight_VI, x_CI.T), None if bias_V is None else bias_V[:, None]
        else:
            product, wide = self.product[:count], self.wide[:count]
            factors, bias = (x_CI, weight_VI.T), bias_V
        if bias is None:
            torch.mm(*factors, out=product)
        else:
            torch.addmm(bias, *factors, out=product)
        if wide.dtype != product.dtype:
            wide.copy_(product)
        z_CV = wide.T if self.is_flipped else wide
        return z_CV.sub_(z_CV.amax(dim=-1, keepdim=True))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first_TI: Tensor, second_TI: Tensor | None, head: _Head, labels_T: Tensor, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        of_task_TI = torch.zeros_like(first_TI) if wants_gradient else None
        of_agreement_TI = torch.zeros_like(first_TI) if wants_gradient and second_TI is not None else None
        tokens_N = (labels_T != IGNORED).nonzero().squeeze(1)
        most = min(CHUNK, len(tokens_N))
        room = _Logits(head, first_TI, most)
        other = None if second_TI is None else _Logits(head, second_TI, most)
        ratio = None if other is None else torch.empty_like(other.wide)

        def sweep(rows_C: Tensor) -> tuple[Tensor, Tensor]:
            z_CV, labels_C = room.fill(first_TI[rows_C]), labels_T[rows_C]
            task_C = _label_scores(z_CV, labels_C, head.smoothing)
            agreement = z_CV.new_zeros(())
            if second_TI is None or other is None or ratio is None:
                log_sum_C = _normalise(z_CV)
            else:
                log_sum_C, agreement, apart_CV = _compare(
                    z_CV, other.fill(second_TI[rows_C]), room.cut(ratio, len(rows_C))
                )
                head.put_gradient(of_agreement_TI, rows_C, apart_CV)
            if wants_gradient:
                head.put_gradient(of_task_TI, rows_C, _subtract_labels(z_CV, labels_C, head.smoothing))
            return (log_sum_C - task_C).sum(), agreement

        chunks = tokens_N.split(CHUNK)
        task, agreement = (torch.stack(values).sum() for values in zip(*map(sweep, chunks), strict=True))
        ctx.save_for_backward(of_task_TI, of_agreement_TI)
        return task, agreement

    @staticmethod
    def backward(ctx: Any, by_task: Tensor | None, by_agreement: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TrainingError(
                "fused loss: has no second derivative; valid: create_graph=False, or train with fused_loss=False"
            )
        of_task_TI, of_agreement_TI = ctx.saved_tensors
        first_TI = None if by_task is None else of_task_TI * by_task
        second_TI = None
        if by_agreement is not None and of_agreement_TI is not None:
            # both passes share the head, so what pulls one way here pulls the other way there
            second_TI = of_agreement_TI * -by_agreement
            first_TI = -second_TI if first_TI is None else first_TI.sub_(second_TI)
        return first_TI, second_TI, None, None, None


def _label_scores(z_CV: Tensor, labels_C: Tensor, smoothing: float) -> Tensor:
    """What the smoothed labels read off the logits: [C]."""
    scores_C = z_CV.gather(1, labels_C[:, None]).squeeze(1)
    return scores_C * (1 - smoothing) + z_CV.mean(dim=-1) * smoothing if smoothing else scores_C


def _normalise(z_CV: Tensor) -> Tensor:
    """Make logits probabilities, in place; the logarithm of what they were divided by: [C]."""
    sum_C1 = z_CV.exp_().sum(dim=-1, keepdim=True)
    z_CV.div_(sum_C1)
    return sum_C1.squeeze(1).log()


def _subtract_labels(p_CV: Tensor, labels_C: Tensor, smoothing: float) -> Tensor:
    """From probabilities the gradient of the cross entropy, in place."""
    p_CV.scatter_add_(1, labels_C[:, None], torch.full_like(p_CV[:, :1], smoothing - 1))
    return p_CV.sub_(smoothing / p_CV.shape[1]) if smoothing else p_CV


def _compare(z_CV: Tensor, other_CV: Tensor, ratio_CV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise two sets of logits to p and q, in place.

    Returns the logarithm of p's sum, 1/2 sum (p - q) (log p - log q), and its gradient (p - q) / 2 by the first logits,
    which takes the place of q. `ratio_CV`: room to work in.
    """
    torch.sub(z_CV, other_CV, out=ratio_CV)
    log_sum_C, log_other_C = _normalise(z_CV), _normalise(other_CV)
    apart_CV = torch.sub(z_CV, other_CV, out=other_CV).div_(2)
    shift_C = (log_other_C - log_sum_C) * apart_CV.sum(dim=-1)
    return log_sum_C, ratio_CV.mul_(apart_CV).sum() + shift_C.sum(), apart_CV
