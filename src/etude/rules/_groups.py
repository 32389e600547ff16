"""A param group: its parameters' names, how they are split, what of them the rule cannot serve; its knobs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from etude.rules._rule import Chain
from etude.rules._split import Split
from etude.rules._split import check as check_split
from etude.rules._spread import check as check_spread
from etude.rules._spread import is_distributed


def names_of(group: dict[str, Any], i: int) -> list[str]:
    """The names of a group's parameters, or their places where they came without."""
    names: list[str] = group.get("param_names") or [f"{i}.{j}" for j in range(len(group["params"]))]
    return names


def refuse(group: dict[str, Any], i: int, rule: Chain) -> None:
    """Refuse, by name, what the rule cannot serve."""
    owners = group.get("owners", [])
    if owners and len(owners) != len(group["params"]):
        raise ValueError(f"owners: {len(owners)} for {len(group['params'])} parameters; each needs its model's index")
    for key, value in group.items():
        if isinstance(value, Tensor) and value.ndim and value.shape != (max(owners, default=0) + 1,):
            raise ValueError(
                f"{key} of shape {tuple(value.shape)}: a knob is one number, or one for each of "
                f"{max(owners, default=0) + 1} models"
            )
    if len(group.get("split", group["params"])) != len(group["params"]):
        raise ValueError(f"split: {len(group['split'])} for {len(group['params'])} parameters; each needs one, or None")
    for j, (name, p) in enumerate(zip(names_of(group, i), group["params"])):
        check_spread(name, p, rule)
        check_split(name, p, split_of(group, j))
        if is_distributed(p) and any(owners):
            raise ValueError(f"{name} is sharded, and this optimizer trains several models: a population is not")
        if rule.width == "shape" and p.is_complex():
            raise ValueError(f"{rule.name} is for real tensors and {name} is complex")
        if rule.width == "matrix" and (p.ndim < 2 or p.is_complex()):
            what = "is complex" if p.is_complex() else f"has shape {tuple(p.shape)}"
            raise ValueError(
                f"{rule.name} is for real matrices and {name} {what}: "
                f"give the model, or route(matrices={rule.name}(), rest=adamw())"
            )


def split_of(group: dict[str, Any], j: int) -> Split:
    """How parameter j of the group is split: (axis, matrices)."""
    given = group["split"][j] if "split" in group else None
    return None if given is None else (int(given[0]), int(given[1]))


def same_knobs(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sets of knobs are the same; a tensor is the same only if it is that very tensor."""
    return all(
        x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else x == y for x, y in zip(a.values(), b.values())
    )
