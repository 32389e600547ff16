"""How a checkpoint, ours or torch's, is brought to fit an optimizer; all of it before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from etude.rules._rule import Chain

_SCHEDULERS = ("initial_", "max_", "min_", "base_", "swa_")
"""How keys begin that torch's schedulers leave in a group and want back."""


def aligned(mine: list[dict[str, Any]], theirs: list[dict[str, Any]], rules: Sequence[Chain]) -> list[dict[str, Any]]:
    """The saved groups in this optimizer's order of parameters, with the rules' knobs and the schedulers' keys."""
    if len(mine) != len(theirs):
        raise ValueError(f"the checkpoint has {len(theirs)} param groups, this optimizer {len(mine)}")
    return [_group(i, a, b, rule) for i, (a, b, rule) in enumerate(zip(mine, theirs, rules))]


def _group(i: int, mine: dict[str, Any], theirs: dict[str, Any], rule: Chain) -> dict[str, Any]:
    if theirs.get("rule", mine["rule"]) != mine["rule"]:
        raise ValueError(f"group {i}: the checkpoint is of {theirs['rule']}, this optimizer plays {mine['rule']}")
    params = list(theirs["params"])
    if "param_names" in mine and "param_names" in theirs:
        at = dict(zip(theirs["param_names"], params))
        if set(at) != set(mine["param_names"]):
            odd = sorted(set(at) ^ set(mine["param_names"]))
            raise ValueError(f"group {i}: only one of checkpoint and optimizer has {', '.join(odd[:5])}")
        params = [at[name] for name in mine["param_names"]]
    elif len(params) != len(mine["params"]):
        raise ValueError(f"group {i}: the checkpoint has {len(params)} parameters, the optimizer {len(mine['params'])}")
    kept = {k: v for k, v in theirs.items() if k in rule.knobs() or k.startswith(_SCHEDULERS)}
    return {**{k: v for k, v in mine.items() if k != "params"}, **kept, "params": params}


def fitting(name: str, held: dict[str, Any], keeps: set[str], rule: Chain) -> dict[str, Any]:
    """A parameter's saved state as this optimizer keeps it; what rounding lost may be missing, or unwanted."""
    if "compensation" not in keeps:
        held = {k: v for k, v in held.items() if k != "compensation"}
    timeless = not any(part.clock(1) or "t" in part.reads for part in rule.parts)
    spare = {"compensation", "step"} if timeless else {"compensation"}
    if held and (set(held) - keeps or keeps - set(held) - spare):
        raise ValueError(
            f"{name}: the checkpoint holds {', '.join(sorted(held))}; {rule.name} keeps {', '.join(sorted(keeps))}"
        )
    return held
