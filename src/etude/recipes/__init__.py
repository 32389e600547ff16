"""Methods across rooms: an expression such as ``"muon(lr=0.02) + dyt + zero_init"`` read, applied and saved."""

from etude.recipes._change import Change as Change
from etude.recipes._part import Part as Part
from etude.recipes._recipe import Recipe as Recipe
from etude.recipes._recipe import parse as parse
from etude.recipes.ngpt import Ngpt as Ngpt
from etude.recipes.ngpt import hypersphere as hypersphere
from etude.recipes.ngpt import ngpt as ngpt
from etude.recipes.normalizer_free import fixup as fixup
from etude.recipes.normalizer_free import self_normalizing as self_normalizing

__all__ = ["Change", "Ngpt", "Part", "Recipe", "fixup", "hypersphere", "ngpt", "parse", "self_normalizing"]
