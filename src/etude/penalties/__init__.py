"""θ → ℝ: terms added to the risk that look at the weights."""

from etude.penalties.weights import norm_loss as norm_loss

__all__ = ["norm_loss"]
