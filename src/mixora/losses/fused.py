"""Cross entropy behind a frozen language-model head, some tokens at a time: [tokens, vocabulary] never exists.

Where the head is frozen, only the hidden states want a gradient. It is made beside the loss, while a chunk's logits are
there, and scaled in backward.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from mixora.errors import TrainingError
from mixora.host.devices import counts_as_cpu, is_autocast, without_autocast

IGNORED = -100
Piece = TypeVar("Piece")
CHUNK = 128
"""Tokens at a time with a head in 32 bits; of others as many bytes (benchmarks/fused_loss.py)."""
BLOCK = 2**18
"""Logits at a time, on a CPU, between the products: few enough for a core's cache, enough to outweigh the calls."""


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
    return torch.get_autocast_dtype(device) if is_autocast(device) else weight.dtype


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
    with without_autocast(first_TI):
        return _Sums.apply(first_TI, second_TI, head, labels_T, wanted)


@dataclass(frozen=True)
class _Head:
    """A frozen head whose labels are smoothed; weight and bias in the dtype of its products."""

    weight_VI: Tensor
    bias_V: Tensor | None
    smoothing: float

    def put_logits(self, into_PV: Tensor, x_PI: Tensor) -> None:
        factors = x_PI.to(self.weight_VI.dtype), self.weight_VI.T
        if self.bias_V is None:
            torch.mm(*factors, out=into_PV)
        else:
            torch.addmm(self.bias_V, *factors, out=into_PV)


class _Sweep:
    """Goes over the supervised tokens of one pass or two, chunk by chunk, in memory that every chunk uses again.

    `hidden`: the hidden states of each pass. `gradients`: by the first ones, of the cross entropy; by the second ones,
    of twice the agreement, with the sign changed. Empty where none are wanted.
    """

    def __init__(self, head: _Head, hidden: list[Tensor], labels_T: Tensor, wants_gradient: bool) -> None:
        self.head, self.hidden, self.labels_T = head, hidden, labels_T
        self.gradients = [torch.zeros_like(hidden_TI) for hidden_TI in hidden] if wants_gradient else []
        self.tokens_N = (labels_T != IGNORED).nonzero().squeeze(1)
        weight_VI, on_cpu = head.weight_VI, counts_as_cpu(head.weight_VI)
        self.chunk = max(4 * CHUNK // weight_VI.itemsize, 1)
        most = min(self.chunk, len(self.tokens_N))
        self.block = max(BLOCK // len(weight_VI), 1) if on_cpu else self.chunk
        self.logits = weight_VI.new_empty(len(hidden) * most, len(weight_VI))
        dtype = torch.promote_types(torch.promote_types(hidden[0].dtype, weight_VI.dtype), torch.float32)
        copies = 0 if dtype == weight_VI.dtype else len(hidden)
        room = weight_VI.new_empty(copies + len(hidden) - 1, min(self.block, most), len(weight_VI), dtype=dtype)
        self.wide, self.ratio = room[:copies], room[copies:]

    def run(self) -> tuple[Tensor, Tensor]:
        """Both sums; leaves the gradients behind."""
        chunks = self._first_if_meta(self.tokens_N.split(self.chunk))
        sums = [of_block for rows_C in chunks for of_block in self._run(rows_C)]
        task, agreement = (torch.stack(values).sum() for values in zip(*sums, strict=True))
        return task, agreement

    def _first_if_meta(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """On the meta device nothing is computed, and the first piece takes what the others would take after it."""
        return pieces[:1] if self.labels_T.is_meta else pieces

    def _run(self, rows_C: Tensor) -> list[tuple[Tensor, Tensor]]:
        passes = len(self.hidden)
        z_PV = self.logits[: passes * len(rows_C)]
        rows = [hidden_TI[rows_C] for hidden_TI in self.hidden]
        self.head.put_logits(z_PV, torch.cat(rows) if passes > 1 else rows[0])
        del rows
        of_blocks = zip(*(z_CV.split(self.block) for z_CV in z_PV.chunk(passes)), strict=True)
        labels = self.labels_T[rows_C].split(self.block)
        blocks = self._first_if_meta(list(zip(of_blocks, labels, strict=True)))
        sums = [self._reduce(z, labels_r) for z, labels_r in blocks]
        if self.gradients:
            for into_TI, of_CI in zip(self.gradients, (z_PV @ self.head.weight_VI).chunk(passes), strict=True):
                into_TI[rows_C] = of_CI.to(into_TI.dtype)
        return sums

    def _reduce(self, z: tuple[Tensor, ...], labels_r: Tensor) -> tuple[Tensor, Tensor]:
        """The cross entropy of a block of tokens, and 1/2 sum (p - q) (log p - log q), or 0 for one pass.

        `z`: the logits of each pass, [r, V]; what `gradients` are made from takes their place.
        """
        wide = [self._widen(number, z_rV) for number, z_rV in enumerate(z)]
        p_rV, smoothing = wide[0], self.head.smoothing
        task_r, agreement = -_label_scores(p_rV, labels_r, smoothing), p_rV.new_zeros(())
        if len(wide) == 1:
            task_r += _normalise(p_rV)
        else:
            log_sum_r, agreement = _compare(p_rV, wide[1], self.ratio[0, : len(p_rV)])
            task_r += log_sum_r
        _subtract_labels(p_rV, labels_r, smoothing)
        if len(self.wide):
            for z_rV, wide_rV in zip(z, wide, strict=True):
                z_rV.copy_(wide_rV)
        return task_r.sum(), agreement

    def _widen(self, number: int, z_rV: Tensor) -> Tensor:
        """The logits of a block in at least fp32, less the largest of each token; in place where they are so wide."""
        wide_rV = self.wide[number, : len(z_rV)].copy_(z_rV) if len(self.wide) else z_rV
        return wide_rV.sub_(wide_rV.amax(dim=-1, keepdim=True))


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, first_TI: Tensor, second_TI: Tensor | None, head: _Head, labels_T: Tensor, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        sweep = _Sweep(head, [first_TI] if second_TI is None else [first_TI, second_TI], labels_T, wants_gradient)
        task, agreement = sweep.run()
        ctx.save_for_backward(*sweep.gradients)
        return task, agreement

    @staticmethod
    def backward(ctx: Any, by_task: Tensor | None, by_agreement: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TrainingError(
                "fused loss: has no second derivative; valid: create_graph=False, or train with fused_loss=False"
            )
        of_task_TI, *of_agreement_TI = ctx.saved_tensors
        first_TI = None if by_task is None else of_task_TI * by_task
        second_TI = None
        if by_agreement is not None and of_agreement_TI:
            # both passes share the head, so what pulls one way here pulls the other way there
            second_TI = of_agreement_TI[0] * (-by_agreement / 2)
            first_TI = -second_TI if first_TI is None else first_TI.sub_(second_TI)
        return first_TI, second_TI, None, None, None


def _label_scores(z_CV: Tensor, labels_C: Tensor, smoothing: float) -> Tensor:
    """What the smoothed labels read off the logits: [C]."""
    scores_C = z_CV.gather(1, labels_C[:, None]).squeeze(1)
    return scores_C * (1 - smoothing) + z_CV.mean(dim=-1) * smoothing if smoothing else scores_C


def _normalise(z_CV: Tensor) -> Tensor:
    """Turn logits into probabilities, in place; the logarithm of what they were divided by: [C]."""
    sum_C1 = z_CV.exp_().sum(dim=-1, keepdim=True)
    z_CV.mul_(1 / sum_C1)
    return sum_C1.squeeze(1).log()


def _subtract_labels(p_CV: Tensor, labels_C: Tensor, smoothing: float) -> None:
    """From probabilities the gradient of the cross entropy, in place."""
    p_CV.scatter_add_(1, labels_C[:, None], torch.full_like(p_CV[:, :1], smoothing - 1))
    if smoothing:
        p_CV.sub_(smoothing / p_CV.shape[1])


def _compare(p_CV: Tensor, q_CV: Tensor, ratio_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Normalise two sets of logits to p and q, in place, then put p - q in the place of q.

    Returns the logarithm of p's sum, and 1/2 sum (p - q) (log p - log q). `ratio_CV`: room to work in.
    """
    torch.sub(p_CV, q_CV, out=ratio_CV)
    log_p_C, log_q_C = _normalise(p_CV), _normalise(q_CV)
    apart_CV = torch.sub(p_CV, q_CV, out=q_CV)
    shift_C = (log_q_C - log_p_C) * apart_CV.sum(dim=-1)
    return log_p_C, (ratio_CV.mul_(apart_CV).sum() + shift_C.sum()) / 2
