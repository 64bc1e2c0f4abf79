"""Cross entropy behind a frozen language-model head, some tokens at a time: [tokens, vocabulary] never exists.

Where the head is frozen, only the hidden states want a gradient. It is made beside the loss, while a chunk's logits are
there, and scaled in backward.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mixora.errors import TrainingError

IGNORED = -100
CHUNK = 256
"""Tokens at a time: below 128 the products are too thin, above 256 the logits leave the cache and nothing is won."""


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
    hidden = [h for h in (first_TI, second_TI) if h is not None]
    with_grad = torch.is_grad_enabled() and any(h.requires_grad for h in hidden)
    head = weight_VI.to(dtype), None if bias_V is None else bias_V.to(dtype)
    with torch.autocast(first_TI.device.type, enabled=False):
        return _Sums.apply(first_TI, second_TI, *head, labels_T, smoothing, with_grad)


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        first_TI: Tensor,
        second_TI: Tensor | None,
        weight_VI: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        smoothing: float,
        with_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        dtype = torch.promote_types(torch.promote_types(first_TI.dtype, weight_VI.dtype), torch.float32)
        task, agreement = (torch.zeros((), dtype=dtype, device=first_TI.device) for _ in range(2))
        of_task_TI = torch.zeros_like(first_TI) if with_grad else None
        of_agreement_TI = torch.zeros_like(first_TI) if with_grad and second_TI is not None else None
        supervised_N = (labels_T != IGNORED).nonzero().squeeze(1)
        for rows_C in supervised_N.split(CHUNK):
            log_p_CV = _log_probabilities(first_TI[rows_C], weight_VI, bias_V, dtype)
            task += _task(log_p_CV, labels_T[rows_C], smoothing)
            p_CV = log_p_CV
            if second_TI is None:
                p_CV.exp_()
            else:
                log_q_CV = _log_probabilities(second_TI[rows_C], weight_VI, bias_V, dtype)
                value, difference_CV = _compare(log_p_CV, log_q_CV)
                agreement += value
                _put_gradient(of_agreement_TI, rows_C, difference_CV.div_(2), weight_VI)
            if of_task_TI is not None:
                wanted = torch.full_like(p_CV[:, :1], smoothing - 1)
                p_CV.scatter_add_(1, labels_T[rows_C, None], wanted)
                if smoothing:
                    p_CV.sub_(smoothing / p_CV.shape[1])
                _put_gradient(of_task_TI, rows_C, p_CV, weight_VI)
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
        return first_TI, second_TI, None, None, None, None, None


def _log_probabilities(x_CI: Tensor, weight_VI: Tensor, bias_V: Tensor | None, dtype: torch.dtype) -> Tensor:
    return F.log_softmax(F.linear(x_CI.to(weight_VI.dtype), weight_VI, bias_V), dim=-1, dtype=dtype)


def _task(log_p_CV: Tensor, labels_C: Tensor, smoothing: float) -> Tensor:
    task = log_p_CV.gather(1, labels_C[:, None]).sum() * (smoothing - 1)
    return task - log_p_CV.sum() * (smoothing / log_p_CV.shape[1]) if smoothing else task


def _compare(log_p_CV: Tensor, log_q_CV: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 sum (p - q) (log p - log q), and p - q; the arguments become p and p - q."""
    ratio_CV = log_p_CV - log_q_CV
    difference_CV = log_q_CV.exp_().neg_().add_(log_p_CV.exp_())
    return ratio_CV.mul_(difference_CV).sum() / 2, difference_CV


def _put_gradient(into_TI: Tensor | None, rows_C: Tensor, of_logits_CV: Tensor, weight_VI: Tensor) -> None:
    if into_TI is not None:
        into_TI[rows_C] = (of_logits_CV.to(weight_VI.dtype) @ weight_VI).to(into_TI.dtype)
