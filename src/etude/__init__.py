"""Études for neural networks: every published way to train one, in one line, and a race that tells which helps.

The rooms stand in the order in which data meets them in one training step.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterable
from typing import Any

from torch import nn

from etude import after as after
from etude import blocks as blocks
from etude import gradients as gradients
from etude import init as init
from etude import losses as losses
from etude import norms as norms
from etude import penalties as penalties
from etude import probes as probes
from etude import recipes as recipes
from etude import risks as risks
from etude import rules as rules
from etude import schedules as schedules
from etude import weights as weights
from etude._method import methods
from etude._words import nearest

__version__ = importlib.metadata.version("etude")
__all__ = [
    "after", "blocks", "gradients", "init", "losses", "norms", "optimizer", "penalties", "probes", "race", "recipes",
    "risks", "rules", "schedules", "weights",
]  # fmt: skip


def optimizer(rule: Any, model: nn.Module | Iterable[Any], **knobs: Any) -> rules.Optimizer:
    """A torch optimizer by the name of its rule, ``optimizer("muon", model, lr=1e-3)``, or of a rule value.

    ``knobs``: the rule's own, and the options of ``rules.optimizer`` (roles, inputs, engine, rounding, resident,
    maximize). An unknown name, an unknown knob, and knobs beside a finished value are errors.
    """
    options = {k: knobs.pop(k) for k in rules.OPTIONS if k in knobs}
    if not isinstance(rule, str):
        if knobs:
            raise TypeError(f"optimizer got a finished rule and the knobs {', '.join(knobs)}; give them to the rule")
        return rules.optimizer(model, rule, **options)
    known = {m.name: m for m in methods().values() if m.room == "rules"}
    if rule not in known:
        raise ValueError(f"no rule {rule!r}; nearest: {nearest(rule, known)}; the rules are {', '.join(known)}")
    unknown = [k for k in knobs if k not in known[rule].knobs]
    if unknown:
        raise TypeError(f"{rule} has no knob {', '.join(unknown)}; its knobs are {', '.join(known[rule].knobs)}")
    return rules.optimizer(model, known[rule].fn(**knobs), **options)


def __getattr__(name: str) -> Any:
    if name == "race":  # needs the extra etude[race]; everything else needs torch alone
        return importlib.import_module("etude.race")
    raise AttributeError(f"module 'etude' has no attribute {name!r}")
