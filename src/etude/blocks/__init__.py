"""Blocks, x → y: residual placements of norms, and attention."""

from etude.blocks.attention import Attention as Attention
from etude.blocks.attention import UnitQK as UnitQK
from etude.blocks.attention import attention as attention
from etude.blocks.attention import qk_norm as qk_norm
from etude.blocks.residual import Residual as Residual
from etude.blocks.residual import peri_ln as peri_ln
from etude.blocks.residual import post_ln as post_ln
from etude.blocks.residual import pre_ln as pre_ln

__all__ = ["Attention", "Residual", "UnitQK", "attention", "peri_ln", "post_ln", "pre_ln", "qk_norm"]
