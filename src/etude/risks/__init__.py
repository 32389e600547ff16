"""ℓ[n] → ℓ: how the losses of examples and groups become one number to minimise."""

from etude.risks._risk import Risk as Risk
from etude.risks.mean import mean as mean
from etude.risks.robust import group_dro as group_dro

__all__ = ["Risk", "group_dro", "mean"]
