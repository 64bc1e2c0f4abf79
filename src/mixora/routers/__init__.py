"""How tokens choose experts."""

from mixora.contracts import Router
from mixora.routers.null_topk import NullTopK
from mixora.routers.single import Single
from mixora.routers.soft import Soft
from mixora.routers.threshold import Threshold
from mixora.routers.topk import TopK
from mixora.routers.uniform import Uniform

ROUTERS: dict[str, type[Router]] = {
    "topk": TopK,
    "single": Single,
    "soft": Soft,
    "threshold": Threshold,
    "null_topk": NullTopK,
    "uniform": Uniform,
}

__all__ = ["ROUTERS", "NullTopK", "Single", "Soft", "Threshold", "TopK", "Uniform"]
