"""V → W: the weight that a layer sees, made from what is trained. ``put`` attaches a map, by role or by name."""

from etude.weights._host import disable as disable
from etude.weights._host import enable as enable
from etude.weights._host import freeze as freeze
from etude.weights._host import merge as merge
from etude.weights._host import put as put
from etude.weights._host import remove as remove
from etude.weights._host import unmerge as unmerge
from etude.weights._map import Adapter as Adapter
from etude.weights._map import Map as Map
from etude.weights._store import load as load
from etude.weights._store import save as save
from etude.weights.direction import spectral_norm as spectral_norm
from etude.weights.direction import weight_norm as weight_norm
from etude.weights.direction import weight_standardization as weight_standardization
from etude.weights.low_rank import lora as lora

__all__ = [
    "Adapter", "Map", "disable", "enable", "freeze", "load", "lora", "merge", "put", "remove", "save", "spectral_norm",
    "unmerge", "weight_norm", "weight_standardization",
]  # fmt: skip
