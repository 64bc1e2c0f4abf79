"""Auxiliary losses: on what the routers decided, and on the agreement of passes."""

from mixora.contracts import Loss
from mixora.losses.consistency import Consistency
from mixora.losses.load_balance import LoadBalance
from mixora.losses.z_loss import ZLoss

LOSSES: dict[str, type[Loss]] = {"load_balance": LoadBalance, "z_loss": ZLoss, "consistency": Consistency}

__all__ = ["LOSSES", "Consistency", "LoadBalance", "ZLoss"]
