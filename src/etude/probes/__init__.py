"""step → number: what is read off the weights while they train, for one copy of them and one pass over them."""

from etude.probes._probe import Bound as Bound
from etude.probes._probe import Probe as Probe
from etude.probes.signal import layer_rotation as layer_rotation
from etude.probes.signal import update_ratio as update_ratio

__all__ = ["Bound", "Probe", "layer_rotation", "update_ratio"]
