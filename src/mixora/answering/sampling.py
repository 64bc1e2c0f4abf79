"""Which token comes next: the likeliest, or one drawn with a generator that belongs to one answer alone."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot hold."""


@dataclass(frozen=True)
class Sampling:
    """How an answer is made, and where it ends.

    temperature: 0 takes the likeliest token. top_p: draw among the likeliest tokens that together have this
    probability. seed: None draws anew each time. stop: texts before which the answer ends. top_logprobs: how many of
    the likeliest tokens are told beside each; None for no log probabilities.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


class Choice(NamedTuple):
    """A token, its log probability under the model, and the likeliest tokens with theirs.

    `offset`: the characters of the answer before it.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


class Sampler:
    """The draws of one answer: they depend on its seed and its logits, not on what else is computed beside it."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits_V: Tensor) -> Choice:
        """The next token. Log probabilities are the model's own, before temperature and top_p.

        Raises `ArithmeticError` for logits that are not numbers.
        """
        logits_V = logits_V.detach().to("cpu", torch.float64)
        if logits_V.isnan().any() or logits_V.max().isinf():
            raise ArithmeticError("the model's logits are NaN or infinite")
        token = int(logits_V.argmax()) if self.sampling.temperature == 0 else self._draw(logits_V)
        if self.sampling.top_logprobs is None:
            return Choice(token)
        logprobs_V = logits_V.log_softmax(dim=0).clamp(min=LEAST_LOGPROB)
        values, tokens = logprobs_V.topk(min(self.sampling.top_logprobs, len(logprobs_V)))
        return Choice(token, float(logprobs_V[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))

    def _draw(self, logits_V: Tensor) -> int:
        # the largest is 0, so that no temperature above 0 makes infinity less infinity
        probs_V = ((logits_V - logits_V.max()) / self.sampling.temperature).softmax(dim=0)
        if self.sampling.top_p < 1:
            sorted_V, order_V = probs_V.sort(descending=True, stable=True)
            is_out_V = sorted_V.cumsum(dim=0) - sorted_V >= self.sampling.top_p
            # the likeliest token stays, whatever top_p
            is_out_V[0] = False
            probs_V[order_V[is_out_V]] = 0
        return int(torch.multinomial(probs_V, 1, generator=self._generator))
