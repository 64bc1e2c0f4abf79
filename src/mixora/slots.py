"""The slots of a feed-forward part whose experts go through all of it: K hidden states of each token, one per expert.

They stand below each other along the first dimension, [K * B, ..., F], all first choices before all second ones, and
so pass through whatever a model does between its linears, token by token.
"""

from collections.abc import Set

from torch import Tensor

from mixora.errors import ModelError
from mixora.passes import Shared
from mixora.routing import Routing


def find_routing(shared: Shared | None, leader: str, firsts: Set[str], path: str, x: Tensor) -> Routing:
    """The routing by which the linears `firsts` have made the slots `x`, which the part's last linear at `path` reads.

    `shared`: the last routing of this pass. Raises `ModelError` where it was not made for this part by all of them.
    """
    if shared is None or shared.path != leader or shared.readers != firsts:
        raise ModelError(
            f"{path}: ends a feed-forward part, but {', '.join(sorted(firsts))} did not all read one input before it "
            "in this pass; valid: a forward pass of the whole model, in which they do"
        )
    tokens, slots = shared.routing.experts_TK.shape
    if x.shape[:-1].numel() != tokens * slots:
        raise ModelError(
            f"{path}: got a hidden state of shape {list(x.shape)}, where the feed-forward part began with {slots} "
            f"slots for each of {tokens} tokens; valid: a part that changes tokens one by one"
        )
    return shared.routing


def mix(x: Tensor, routing: Routing) -> Tensor:
    """The slots [K * B, ..., F] of each token, weighted: [B, ..., F].

    The weights sum to 1. As the first slot plus weighted differences, equal slots give exactly what one of them holds,
    and a token without weights keeps its first.
    """
    tokens, slots = routing.experts_TK.shape
    x_KTF = x.reshape(slots, tokens, x.shape[-1])
    weights_KT1 = routing.weights_TK.T[..., None].to(x.dtype)
    mixed_TF = x_KTF[0] + (weights_KT1[1:] * (x_KTF[1:] - x_KTF[0])).sum(dim=0)
    return mixed_TF.reshape(len(x) // slots, *x.shape[1:])
