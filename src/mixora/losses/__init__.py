"""Auxiliary losses on what the routers decided."""

from mixora.contracts import Loss
from mixora.losses.load_balance import LoadBalance
from mixora.losses.z_loss import ZLoss

LOSSES: dict[str, type[Loss]] = {"load_balance": LoadBalance, "z_loss": ZLoss}

__all__ = ["LOSSES", "LoadBalance", "ZLoss"]
