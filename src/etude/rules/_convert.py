"""Checkpoints of torch's optimizers, brought here and back: the same state under the other side's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from etude.rules.adaptive import amsgrad
from etude.rules.named import adam, adamw, muon, sgd

StateDict = dict[str, Any]


@dataclass(frozen=True)
class _Pair:
    """An optimizer of torch and the rule that is the same arithmetic."""

    theirs: type[torch.optim.Optimizer]
    rule: Callable[..., Any]
    state: Mapping[str, str]
    """Their names of the state, and ours."""
    lacks: Mapping[str, Any]
    """Knobs of theirs that the rule has only at this value."""
    missing: Mapping[str, Any] = field(default_factory=dict)
    """Knobs of ours that they have only at this value."""
    counts: bool = False
    """Whether they keep the step count; where nothing depends on it, they have none."""

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(self.theirs([torch.zeros(1, 1)]).defaults)  # type: ignore[call-arg]


_MOMENTS = {name: name for name in ("step", "exp_avg", "exp_avg_sq")}
_MOST = {**_MOMENTS, "max_exp_avg_sq": "max_exp_avg_sq"}
_PLAIN = {"maximize": False, "differentiable": False}
PAIRS = {
    ("torch.Adam", "adam"): _Pair(
        torch.optim.Adam, adam, _MOMENTS, {**_PLAIN, "amsgrad": False, "weight_decay": 0.0}, counts=True
    ),
    ("torch.AdamW", "adamw"): _Pair(
        torch.optim.AdamW, adamw, _MOMENTS, {**_PLAIN, "amsgrad": False}, {"uncoupled": False}, counts=True
    ),
    ("torch.Adam", "amsgrad"): _Pair(
        torch.optim.Adam, amsgrad, _MOST, {**_PLAIN, "amsgrad": True, "weight_decay": 0.0}, {"debias": True},
        counts=True,
    ),
    ("torch.AdamW", "amsgrad"): _Pair(
        torch.optim.AdamW, amsgrad, _MOST, {**_PLAIN, "amsgrad": True}, {"debias": True}, counts=True
    ),
    ("torch.SGD", "sgd"): _Pair(
        torch.optim.SGD, sgd, {"momentum_buffer": "momentum_buffer"}, {**_PLAIN, "dampening": 0.0}
    ),
    ("torch.Muon", "muon"): _Pair(
        torch.optim.Muon, muon, {"momentum_buffer": "exp_avg"},
        {"ns_coefficients": (3.4445, -4.775, 2.0315), "eps": 1e-7},
    ),
}  # fmt: skip
"""By torch's name and the rule's."""


def convert(state_dict: StateDict | Sequence[StateDict], *, from_: str | Sequence[str], to: str | Sequence[str]) -> Any:
    """A checkpoint of torch's optimizer as one of the rule that is the same arithmetic, or back; nothing is lost.

    ``convert(theirs, from_="torch.AdamW", to="adamw")`` and ``convert(ours, from_="adamw", to="torch.AdamW")``; so for
    Adam, SGD and Muon, and ``amsgrad`` where theirs has ``amsgrad=True``. Where one optimizer here plays several rules,
    name one of torch's for each: a list of their checkpoints becomes one of ours,
    ``convert([a, b], from_=["torch.Muon", "torch.AdamW"], to=["muon", "adamw"])``, and back. What the other side has no
    place for is an error. The tensors are shared, not copied.
    """
    several = not isinstance(from_, str)
    starts, ends = ([x] if isinstance(x, str) else list(x) for x in (from_, to))
    sides = list(zip(starts, ends, strict=True))
    pairs = [_pair(a, b) for a, b in sides]
    if all((a, b) in PAIRS for a, b in sides):
        given = list(state_dict) if several else [state_dict]
        if len(given) != len(pairs) or not all(isinstance(x, Mapping) for x in given):
            raise ValueError(f"convert(): {len(pairs)} optimizers of torch need a list of {len(pairs)} checkpoints")
        return _merged([_here(x, pair, side) for x, pair, (side, _) in zip(given, pairs, sides)])  # type: ignore[arg-type]
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"convert(): from {', '.join(a for a, _ in sides)} it takes one checkpoint, got a list")
    made = [_there(_only(state_dict, pair, sides), pair, side) for pair, (_, side) in zip(pairs, sides)]
    return made if several else made[0]


def _pair(a: str, b: str) -> _Pair:
    ways = {**PAIRS, **{(b, a): p for (a, b), p in PAIRS.items()}}
    if (a, b) not in ways:
        goes = [end for start, end in ways if start == a]
        said = (
            f"{a} goes to {' or '.join(goes)}"
            if goes
            else f"from_ is one of {', '.join(dict.fromkeys(start for start, _ in ways))}"
        )
        raise ValueError(f"convert(from_={a!r}, to={b!r}): {said}")
    return ways[a, b]


def _here(theirs: Mapping[str, Any], pair: _Pair, side: str) -> StateDict:
    """Their checkpoint as ours. Switches that decide only how they compute ride along, for the way back."""
    name = pair.rule.__name__
    groups = []
    for i, group in enumerate(theirs["param_groups"]):
        _refuse(group, pair.lacks, f"group {i} of {side}", name)
        mine = {k: v for k, v in group.items() if k != "adjust_lr_fn"}
        if "adjust_lr_fn" in group:
            mine["adjust"] = group["adjust_lr_fn"] or "original"
        groups.append({**mine, "rule": name, **pair.missing})
    return {"state": {i: _renamed(s, pair.state, i, name) for i, s in theirs["state"].items()}, "param_groups": groups}


def _there(ours: Mapping[str, Any], pair: _Pair, side: str) -> StateDict:
    """Our checkpoint as theirs."""
    groups: list[StateDict] = []
    defaults = pair.defaults
    for i, group in enumerate(ours["param_groups"]):
        _refuse(group, pair.missing, f"group {i} of {pair.rule.__name__}", side)
        several = [k for k, v in group.items() if isinstance(v, Tensor) and v.ndim]
        if several:
            raise ValueError(f"group {i}: {', '.join(several)} has a value for each of several models, {side} but one")
        theirs = {k: v for k, v in group.items() if k not in ("rule", "owners", "adjust", *pair.missing)}
        if "adjust" in group:
            theirs["adjust_lr_fn"] = group["adjust"]
        groups.append({**defaults, **pair.lacks, **theirs})
    back = {mine: their for their, mine in pair.state.items()}
    state = {}
    for i, entry in ours["state"].items():
        spare = {} if pair.counts else {"step"}
        lost = entry.get("compensation")
        if lost is not None and lost.any():
            raise ValueError(
                f"parameter {i}: compensation holds what rounding lost of a short weight, and {side} has no place for "
                "it; delete it from the state to let it go"
            )
        kept = {k: v for k, v in entry.items() if k not in {"compensation", *spare}}
        state[i] = _renamed(kept, back, i, side)
        if "step" in state[i]:  # torch counts in floats
            precise = torch.get_default_dtype() == torch.float64
            state[i]["step"] = torch.tensor(float(entry["step"]), dtype=torch.float64 if precise else torch.float32)
    return {"state": {i: s for i, s in state.items() if s}, "param_groups": groups}


def _refuse(group: Mapping[str, Any], only: Mapping[str, Any], whose: str, other: str) -> None:
    for key, value in only.items():
        found = group.get(key, value)
        if found != value:
            raise ValueError(f"{whose} has {key}={found!r}; {other} knows no other than {value!r}")


def _renamed(entry: Mapping[str, Any], names: Mapping[str, str], i: int, other: str) -> dict[str, Any]:
    entry = {k: v for k, v in entry.items() if v is not None}
    if unknown := sorted(set(entry) - set(names)):
        raise ValueError(f"parameter {i} holds {', '.join(unknown)}, which {other} has no place for")
    found = {names[k]: v for k, v in entry.items()}
    return {**found, "step": torch.as_tensor(found["step"]).to(torch.int64)} if "step" in found else found


def _only(ours: Mapping[str, Any], pair: _Pair, sides: Sequence[tuple[str, str]]) -> StateDict:
    """The part of our checkpoint that this rule made, its parameters numbered from 0."""
    plays = [group.get("rule") for group in ours["param_groups"]]
    if left := sorted({str(rule) for rule in plays} - {a for a, _ in sides}):
        raise ValueError(
            f"the checkpoint has groups of {', '.join(left)} too: name an optimizer of torch for each rule, "
            "e.g. from_=['muon', 'adamw'], to=['torch.Muon', 'torch.AdamW']"
        )
    groups = [g for g, rule in zip(ours["param_groups"], plays) if rule == pair.rule.__name__]
    if not groups:
        raise ValueError(f"the checkpoint has no group of {pair.rule.__name__}; its groups are of {', '.join(plays)}")
    place = {index: i for i, index in enumerate(index for g in groups for index in g["params"])}
    return {
        "state": {place[i]: s for i, s in ours["state"].items() if i in place},
        "param_groups": [{**g, "params": [place[i] for i in g["params"]]} for g in groups],
    }


def _merged(parts: Sequence[StateDict]) -> StateDict:
    """Several checkpoints as one: the parameters of the second are numbered after those of the first."""
    state: StateDict = {}
    groups: list[StateDict] = []
    start = 0
    for part in parts:
        state |= {start + i: s for i, s in part["state"].items()}
        groups += [{**g, "params": [start + i for i in g["params"]]} for g in part["param_groups"]]
        start += sum(len(g["params"]) for g in part["param_groups"])
    return {"state": state, "param_groups": groups}
