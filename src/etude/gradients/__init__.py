"""ℓ → g: how a gradient is obtained. A value is called as ``(loss_fn, params) → (loss, grads)``."""

from etude.gradients._gradient import Gradient as Gradient
from etude.gradients._gradient import backward as backward
from etude.gradients.plain import plain as plain
from etude.gradients.sharpness import sam as sam

__all__ = ["Gradient", "backward", "plain", "sam"]
