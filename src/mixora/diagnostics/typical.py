"""Which tokens are typical of an expert: those that reach it far more often than tokens do in general.

A token type was seen n times, and y of these occurrences reached the expert, which a share p of all tokens reaches. The
score is the signed root of the binomial likelihood ratio (Dunning 1993, Computational Linguistics 19(1), eq. for one
sample): with q = y / n and KL(q, p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p)),

    score = sign(q - p) sqrt(2 n KL(q, p))

which for frequent tokens is about the distance of q from p in standard errors, and does not break down where y = n.
Where routing is soft, y is a sum of weights. The score ranks tokens; occurrences in one text are not independent.
"""

import heapq
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from mixora.diagnostics.record import Token, Typical

LEAST_SEEN = 3
LEAST_SCORE = 3.0
MOST_TOKENS = 8
MOST_STRONGEST = 20
Decode = Callable[[int], str]


class TokenCounts:
    """How often each token type was seen at a site and reached each expert, batch after batch."""

    def __init__(self, vocabulary_V: Tensor, num_experts: int) -> None:
        """`vocabulary_V`: the token ids that may come, sorted."""
        self.vocabulary_V = vocabulary_V
        self.seen_V = torch.zeros(len(vocabulary_V), dtype=torch.float64)
        self.reached_VE = torch.zeros(len(vocabulary_V), num_experts, dtype=torch.float64)

    def add(self, ids_T: Tensor, choices_TE: Tensor) -> None:
        """The real tokens of one batch, and how much of each an expert got."""
        place_T = torch.searchsorted(self.vocabulary_V, ids_T.cpu())
        self.seen_V.index_add_(0, place_T, torch.ones(len(place_T), dtype=torch.float64))
        self.reached_VE.index_add_(0, place_T, choices_TE.cpu())

    def find_typical(self, path: str, decode: Decode, most: int = MOST_TOKENS) -> list[Typical]:
        """For each expert its most typical tokens, the highest score first."""
        usual_E = self.reached_VE.sum(dim=0) / self.seen_V.sum().clamp(min=1)
        share_VE = self.reached_VE / self.seen_V.clamp(min=1)[:, None]
        score_VE = score(self.seen_V[:, None], share_VE, usual_E).where(self.seen_V[:, None] >= LEAST_SEEN, 0.0)
        found = []
        for expert, usual in enumerate(usual_E.tolist()):
            best = score_VE[:, expert].topk(min(most, len(score_VE)))
            tokens = [
                Token(
                    text=decode(int(self.vocabulary_V[place])),
                    count=int(self.seen_V[place]),
                    share=float(share_VE[place, expert]),
                    score=value,
                )
                for value, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
                if value >= LEAST_SCORE
            ]
            found.append(Typical(path=path, expert=expert, usual=usual, tokens=tokens))
        return found


def score(seen: Tensor, share: Tensor, usual: Tensor) -> Tensor:
    """See above: n, q and p, which broadcast; 0 where p is 0 or 1."""
    usual = usual.clamp(0, 1)
    share = share.clamp(0, 1)
    divergence = torch.xlogy(share, share / usual) + torch.xlogy(1 - share, (1 - share) / (1 - usual))
    root = (2 * seen * divergence.clamp(min=0)).sqrt() * (share - usual).sign()
    return root.where((usual > 0) & (usual < 1), 0.0)


def find_strongest(of_sites: Iterable[list[Typical]]) -> list[Typical]:
    """Over all sites the tokens with the highest scores, each token once, at the expert where its score is highest."""
    best: dict[str, Typical] = {}
    for rows in of_sites:
        for row in rows:
            for token in row.tokens:
                known = best.get(token.text)
                if known is None or token.score > known.tokens[0].score:
                    best[token.text] = Typical(path=row.path, expert=row.expert, usual=row.usual, tokens=[token])
    return heapq.nlargest(MOST_STRONGEST, best.values(), key=lambda row: row.tokens[0].score)
