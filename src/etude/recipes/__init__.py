"""Methods across rooms: an expression such as ``"muon(lr=0.02) + dyt + zero_init"`` read, applied and saved."""

from etude.recipes._part import Part as Part
from etude.recipes._recipe import Recipe as Recipe
from etude.recipes._recipe import parse as parse

__all__ = ["Part", "Recipe", "parse"]
