"""When a router has collapsed: it sends nearly all tokens to the same few experts. Our own measure.

    evenness = (H(load) - log k) / (log E - log k)        H in nats, E experts, k of them per token

is 1 where the experts are used evenly and 0 where all tokens use the same k experts, whatever E and k are. The entropy
alone would not do: with k = 2 of 8 experts it cannot fall below log 2.
"""

import math
from collections.abc import Sequence

COLLAPSED = 0.15
"""Evenness below which a site counts as collapsed; with one of eight experts per token, one takes about 95 %."""


def measure_evenness(load: Sequence[float | None], experts_per_token: float) -> float | None:
    """See above. `load`: shares of E experts that add up to 1. None for one expert, or without tokens.

    Where every token uses all experts, so that weights and not choices tell the load, k is 1.
    """
    shares = [share for share in load if share]
    if len(load) < 2 or not shares or not all(map(math.isfinite, shares)):
        return None
    entropy = -sum(share * math.log(share) for share in shares)
    uses_all = experts_per_token > len(load) - 0.5
    least = 0.0 if uses_all else math.log(max(experts_per_token, 1.0))
    return min(max((entropy - least) / (math.log(len(load)) - least), 0.0), 1.0)
