"""How far and how fast the weights travel, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from etude._method import method
from etude.probes._probe import Probe


@dataclass(frozen=True, repr=False)
class Rotation(Probe):
    """The direction at the start is kept."""

    def keep(self, w: Tensor) -> Tensor:
        unit: Tensor = w / w.norm()
        return unit

    def read(self, w: Tensor, kept: Tensor) -> Tensor:
        # ½‖a − b‖² = 1 − cos for unit vectors, and does not lose small angles to rounding
        return (self.keep(w) - kept).square().sum() / 2


@dataclass(frozen=True, repr=False)
class UpdateRatio(Probe):
    """The weight before the step is kept."""

    def keep(self, w: Tensor) -> Tensor:
        return w.clone()

    def read(self, w: Tensor, kept: Tensor) -> Tensor:
        ratio: Tensor = (w - kept).norm() / kept.norm()
        kept.copy_(w)
        return ratio


@method(
    "Carbonnelle & De Vleeschouwer 2018, Layer rotation: a surprisingly powerful indicator of generalization in deep "
    "networks?, arXiv:1806.01603"
)
def layer_rotation() -> Probe:
    """1 − cos(w, w₀) of each kernel, w₀ the weight when bound: 0 at first, 1 at right angles; nan if w₀ = 0.

    Runs in which every layer reaches 1 generalise best, says the paper.
    """
    return Rotation()


@method(
    "Karpathy 2015, CS231n Convolutional Neural Networks for Visual Recognition: Neural Networks Part 3, "
    "https://cs231n.github.io/neural-networks-3/#ratio"
)
def update_ratio() -> Probe:
    """‖Δw‖ / ‖w‖ of each kernel, Δw the change since the last call, w the weight before it; about 1e-3 is healthy."""
    return UpdateRatio()
