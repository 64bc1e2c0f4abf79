"""The reference: one expert after the other, each on its own tokens. Slow and plain; the oracle of all kernels."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from mixora.contracts import Kernel
from mixora.routing import Routing

# per expert: the tokens it serves [n], and their slots [n, R_e]
Slots = list[tuple[Tensor, Tensor]]


class Loop(Kernel):
    """Gathers each expert's tokens, computes them, scatters the results back."""

    def expand(self, x_TI: Tensor, w_RI: Tensor, routing: Routing, bias_R: Tensor | None = None) -> Slots:
        """Slots of tokens whose weight is not 0."""
        slots: Slots = []
        biases = [None] * len(self.ranks) if bias_R is None else bias_R.to(x_TI.dtype).split(self.ranks)
        for expert, (w_rI, bias_r) in enumerate(zip(w_RI.split(self.ranks), biases, strict=True)):
            token_n = _find_tokens(routing, expert)
            slots.append((token_n, F.linear(x_TI[token_n], w_rI.to(x_TI.dtype), bias_r)))
        return slots

    def share(self, hidden_Tr: Tensor, routing: Routing) -> Slots:
        """Slots of tokens whose weight is not 0."""
        tokens = [_find_tokens(routing, expert) for expert in range(len(self.ranks))]
        return [(token_n, hidden_Tr[token_n]) for token_n in tokens]

    def map(self, function: Callable[[Tensor], Tensor], slots: Slots) -> Slots:
        """The slots with `function` applied to each number."""
        return [(token_n, function(h_nr)) for token_n, h_nr in slots]

    def by_slot(self, slots: Slots, routing: Routing) -> Slots:
        """Token t becomes k T + t where the expert is its k-th."""
        tokens, turned = len(routing.experts_TK), []
        for expert, (token_n, h_nr) in enumerate(slots):
            choice_n = (routing.experts_TK[token_n] == expert).byte().argmax(dim=1)
            turned.append((choice_n * tokens + token_n, h_nr))
        return turned

    def by_token(self, slots: Slots, routing: Routing) -> Slots:
        """Token k T + t becomes t."""
        return [(token_n % len(routing.experts_TK), h_nr) for token_n, h_nr in slots]

    def contract(self, slots: Slots, w_RO: Tensor, routing: Routing) -> Tensor:
        """Weighted sum over the experts of each token: [T, O]."""
        gates_TE = routing.gates_TE()
        y_TO = slots[0][1].new_zeros(len(gates_TE), w_RO.shape[1])
        for expert, ((token_n, h_nr), w_rO) in enumerate(zip(slots, w_RO.split(self.ranks), strict=True)):
            weight_n = gates_TE[token_n, expert].to(h_nr.dtype)
            y_TO = y_TO.index_add(0, token_n, (h_nr * weight_n[:, None]) @ w_rO.to(h_nr.dtype))
        return y_TO


def _find_tokens(routing: Routing, expert: int) -> Tensor:
    """Indices of the tokens that an expert serves: int64 [n]."""
    if routing.weights_TK.is_meta:
        # memory is estimated on the meta device, where nothing has a value: an even load
        return routing.experts_TK.new_empty(routing.experts_TK.numel() // routing.num_experts)
    return ((routing.experts_TK == expert) & (routing.weights_TK != 0)).any(dim=1).nonzero()[:, 0]
