"""Cross entropy behind a frozen language-model head, some tokens at a time: [tokens, vocabulary] never exists.

Where the head is frozen, only the hidden states want a gradient. It is made beside the loss, while a chunk's logits are
there, and scaled in backward.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

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

    def log_probabilities(self, x_CI: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(x_CI.dtype, self.weight_VI.dtype), torch.float32)
        return F.log_softmax(F.linear(x_CI.to(self.weight_VI.dtype), self.weight_VI, self.bias_V).to(dtype), dim=-1)

    def task(self, log_p_CV: Tensor, labels_C: Tensor) -> Tensor:
        """The cross entropy, summed."""
        task = log_p_CV.gather(1, labels_C[:, None]).sum() * (self.smoothing - 1)
        return task - log_p_CV.mean(dim=-1).sum() * self.smoothing if self.smoothing else task

    def subtract_labels(self, p_CV: Tensor, labels_C: Tensor) -> Tensor:
        """From probabilities the gradient of the cross entropy, in place."""
        p_CV.scatter_add_(1, labels_C[:, None], torch.full_like(p_CV[:, :1], self.smoothing - 1))
        return p_CV.sub_(self.smoothing / p_CV.shape[1]) if self.smoothing else p_CV

    def put_gradient(self, into_TI: Tensor | None, rows_C: Tensor, of_logits_CV: Tensor) -> None:
        if into_TI is not None:
            into_TI[rows_C] = (of_logits_CV.to(self.weight_VI.dtype) @ self.weight_VI).to(into_TI.dtype)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first_TI: Tensor, second_TI: Tensor | None, head: _Head, labels_T: Tensor, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        of_task_TI = torch.zeros_like(first_TI) if wants_gradient else None
        of_agreement_TI = torch.zeros_like(first_TI) if wants_gradient and second_TI is not None else None

        def sweep(rows_C: Tensor) -> tuple[Tensor, Tensor]:
            p_CV, labels_C = head.log_probabilities(first_TI[rows_C]), labels_T[rows_C]
            task, agreement = head.task(p_CV, labels_C), p_CV.new_zeros(())
            if second_TI is None:
                p_CV.exp_()
            else:
                agreement, apart_CV = _compare(p_CV, head.log_probabilities(second_TI[rows_C]))
                head.put_gradient(of_agreement_TI, rows_C, apart_CV)
            if wants_gradient:
                head.put_gradient(of_task_TI, rows_C, head.subtract_labels(p_CV, labels_C))
            return task, agreement

        chunks = (labels_T != IGNORED).nonzero().squeeze(1).split(CHUNK)
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


def _compare(log_p_CV: Tensor, log_q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 sum (p - q) (log p - log q) and its gradient (p - q) / 2 by the first logits; `log_p_CV` becomes p."""
    ratio_CV = log_p_CV - log_q_CV
    apart_CV = log_q_CV.exp_().neg_().add_(log_p_CV.exp_()).div_(2)
    return ratio_CV.mul_(apart_CV).sum(), apart_CV
