"""Norms, x → x̂: which axes share statistics, times what is learned after them."""

from etude.norms._norm import Norm as Norm
from etude.norms._swap import swap as swap
from etude.norms.elementwise import DyT as DyT
from etude.norms.elementwise import dyt as dyt
from etude.norms.named import batch_norm as batch_norm
from etude.norms.named import group_norm as group_norm
from etude.norms.named import instance_norm as instance_norm
from etude.norms.named import layer_norm as layer_norm
from etude.norms.named import rms_norm as rms_norm

__all__ = ["DyT", "Norm", "batch_norm", "dyt", "group_norm", "instance_norm", "layer_norm", "rms_norm", "swap"]
