"""(ŷ, y) → ℓ[n]: one loss per example, in nats. A risk makes a number of them."""

from etude.losses.classify import cross_entropy as cross_entropy
from etude.losses.classify import squentropy as squentropy

__all__ = ["cross_entropy", "squentropy"]
