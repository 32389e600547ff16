"""ℓ → g: how a gradient is obtained. A value is called as ``(loss_fn, params) → (loss, grads)``."""

from etude.gradients._gradient import Gradient as Gradient
from etude.gradients._gradient import backward as backward
from etude.gradients.classes import per_class_normalized_gd as per_class_normalized_gd
from etude.gradients.curvature import hutchinson as hutchinson
from etude.gradients.hyper import best_response as best_response
from etude.gradients.hyper import implicit_hypergradient as implicit_hypergradient
from etude.gradients.hyper import metagradient_descent as metagradient_descent
from etude.gradients.layers import drop_muon as drop_muon
from etude.gradients.lookahead import booster as booster
from etude.gradients.lookahead import extragradient as extragradient
from etude.gradients.model_building import smb as smb
from etude.gradients.natural import inverse_free_ngd as inverse_free_ngd
from etude.gradients.newton import gradient_normalized_newton as gradient_normalized_newton
from etude.gradients.newton import lazy_newton as lazy_newton
from etude.gradients.plain import plain as plain
from etude.gradients.prediction import xgrad as xgrad
from etude.gradients.residual import inductive_gradient_adjustment as inductive_gradient_adjustment
from etude.gradients.sharpness import asam as asam
from etude.gradients.sharpness import awp as awp
from etude.gradients.sharpness import gsam as gsam
from etude.gradients.sharpness import sam as sam
from etude.gradients.sharpness import sam_long_tail as sam_long_tail
from etude.gradients.sharpness import sam_on as sam_on
from etude.gradients.surgery import bloop as bloop

__all__ = [
    "Gradient", "asam", "awp", "backward", "best_response", "bloop", "booster", "drop_muon", "extragradient",
    "gradient_normalized_newton", "gsam", "hutchinson", "implicit_hypergradient", "inductive_gradient_adjustment",
    "inverse_free_ngd", "lazy_newton", "metagradient_descent", "per_class_normalized_gd", "plain", "sam",
    "sam_long_tail", "sam_on", "smb", "xgrad",
]  # fmt: skip
