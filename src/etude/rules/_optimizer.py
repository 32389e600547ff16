"""From a model and a rule to an optimizer: parameters go to rules by role, and all of it can be explained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from etude._roles import ROLES
from etude._roles import roles as read_roles
from etude.rules._engine import RuleOptimizer, state_bytes
from etude.rules._rule import MATRICES, Chain, Route
from etude.rules.named import adamw

OPTIONS = ("roles", "inputs", "engine", "rounding", "resident", "maximize")
"""What ``optimizer`` takes beside the rule's own knobs."""

Arm = tuple[Chain, list[tuple[str, Tensor, str, int]]]
"""A rule and its parameters: name, tensor, role, owner model."""


@dataclass(frozen=True)
class Row:
    """One parameter in ``explain()``."""

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    lr: float
    state_bytes: int


@dataclass(frozen=True)
class Explanation:
    """Which parameter goes to which rule, and what its state weighs. Prints as a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        head = ("parameter", "shape", "role", "rule", "lr", "state")
        body = [
            (r.name, "×".join(map(str, r.shape)) or "scalar", r.role, r.rule, f"{r.lr:g}", f"{r.state_bytes:,} B")
            for r in self.rows
        ]
        widths = [max(len(row[i]) for row in (head, *body)) for i in range(len(head))]
        lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, widths)).rstrip() for row in (head, *body)]
        total = sum(r.state_bytes for r in self.rows)
        return "\n".join([*lines, f"{len(self.rows)} parameters, {total:,} bytes of state"])


class Optimizer(RuleOptimizer):
    """What ``optimizer()`` makes: a RuleOptimizer that knows its parameters' roles."""

    _roles: dict[str, str] = {}  # noqa: RUF012 - replaced per instance, never mutated

    def explain(self) -> Explanation:
        """Every parameter with its role, rule and bytes of state."""
        rows = []
        for i, group in enumerate(self.param_groups):
            names = group.get("param_names", [f"{i}.{j}" for j in range(len(group["params"]))])
            for name, p in zip(names, group["params"]):
                size = state_bytes(_weighed(self.rules[i], [(name, p, "", 0)], self.engine, self.rounding))
                lr = float(group.get("lr", 1.0))
                rows.append(Row(name, tuple(p.shape), self._roles.get(name, "—"), group["rule"], lr, size))
        return Explanation(tuple(rows))

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_roles": self._roles}


def optimizer(
    model_or_params: nn.Module | Sequence[nn.Module] | Iterable[Any], rule: Chain | Route, *,
    roles: Mapping[str, str] | None = None, inputs: Any = None, **options: Any,
) -> Optimizer:  # fmt: skip
    """A ``torch.optim.Optimizer`` that plays ``rule`` on a model, on several models at once, or on parameters.

    A model gives its parameters' names and roles, so a route, or a rule for matrices (with adamw at the same lr for the
    rest), finds its parameters; ``roles`` overrides them by pattern and ``inputs``, an example batch, tells the head by
    use. Several models of one make train as one population. ``options``: ``engine``, ``rounding``, ``resident``,
    ``maximize`` of ``RuleOptimizer``.
    """
    if isinstance(model_or_params, nn.Module):
        arms = _arms([model_or_params], rule, roles, inputs)
    else:
        given = list(model_or_params)
        if not given:
            raise ValueError("optimizer(): no parameters were given")
        if not all(isinstance(m, nn.Module) for m in given):
            return _on_params(given, rule, roles, options)
        arms = _arms(given, rule, roles, inputs)
    several = any(owner for _, ps in arms for *_, owner in ps)
    groups = []
    for _, ps in arms:
        group: dict[str, Any] = {"params": [(name, p) for name, p, _, _ in ps]}
        groups.append({**group, "owners": [o for *_, o in ps]} if several else group)
    made = Optimizer(groups, [chain for chain, _ in arms], **options)
    made._roles = {name: role for _, ps in arms for name, _, role, _ in ps}
    return made


def _on_params(given: list[Any], rule: Chain | Route, roles: Any, options: dict[str, Any]) -> Optimizer:
    if isinstance(rule, Route) or roles is not None:
        raise TypeError(
            f"{rule if isinstance(rule, Route) else 'roles='} needs the model, to read roles; got parameters"
        )
    _check_rule(rule)
    return Optimizer(given, rule, **options)


def _check_rule(rule: Any) -> None:
    if not isinstance(rule, (Chain, Route)):
        raise TypeError(f"expected a rule such as adamw() or route(matrices=muon(), rest=adamw()), got {rule!r}")


def _arms(
    models: Sequence[nn.Module], rule: Chain | Route, overrides: Mapping[str, str] | None, inputs: Any
) -> list[Arm]:
    """Which rule serves which parameters. What cannot be told is an error, never a silent default."""
    _check_rule(rule)
    served = _route(rule)
    arms: list[Arm] = [(chain, []) for _, chain in served]
    for owner, model in enumerate(models):
        role = read_roles(model, overrides, inputs)
        for name, p in model.named_parameters():
            if p.requires_grad:
                i = _serves([arm for arm, _ in served], role[name], name, tuple(p.shape))
                full = f"{owner}.{name}" if len(models) > 1 else name
                arms[i][1].append((full, p, role[name], owner))
    if not any(ps for _, ps in arms):
        raise ValueError(f"{type(models[0]).__name__} has no trainable parameters")
    for (arm, _), (chain, ps) in zip(served, arms):
        if not ps and arm != "rest":
            seen = sorted(set(read_roles(models[0], overrides, inputs).values()))
            raise ValueError(
                f"{chain.name} serves {arm!r} and this model has no such parameter; roles here: {', '.join(seen)}"
            )
    return [(chain, ps) for chain, ps in arms if ps]


def _route(rule: Chain | Route) -> list[tuple[str, Chain]]:
    if isinstance(rule, Route):
        for arm, _ in rule.arms:
            if arm not in (*ROLES, "matrices", "rest"):
                raise ValueError(f"route(): no arm {arm!r}; arms are matrices, rest and the roles {', '.join(ROLES)}")
        return list(rule.arms)
    if rule.width != "matrix":
        return [("all", rule)]
    rest = adamw(lr=rule.knobs()["lr"]) if "lr" in rule.knobs() else adamw()
    return [("matrices", rule), ("rest", rest)]


def _serves(arms: list[str], role: str, name: str, shape: tuple[int, ...]) -> int:
    for i, arm in enumerate(arms):
        if arm in ("all", role) or (arm == "matrices" and role in MATRICES):
            return i
    if role != "unknown" and "rest" in arms:
        return arms.index("rest")
    why = "its module's type does not tell what it is for" if role == "unknown" else f"no arm serves the role {role!r}"
    raise ValueError(
        f"{name} {shape}: {why}; say so with roles={{{name!r}: 'embedding'}} or another of {', '.join(ROLES)}"
    )


def memory(rule: Chain | Route, model: nn.Module, *, roles: Mapping[str, str] | None = None, **options: Any) -> int:
    """Bytes of optimizer state that ``rule`` will keep for ``model``, told before anything is allocated."""
    engine, rounding = options.get("engine", "eager"), options.get("rounding", "kahan")
    return sum(state_bytes(_weighed(chain, ps, engine, rounding)) for chain, ps in _arms([model], rule, roles, None))


def _weighed(chain: Chain, ps: list[tuple[str, Tensor, str, int]], engine: Any, rounding: Any) -> Any:
    """The buckets of these parameters on the meta device: the real plan, without the bytes."""
    ghosts = [torch.empty_like(p, device="meta", requires_grad=True) for _, p, _, _ in ps]
    planned = RuleOptimizer(ghosts, chain, engine=engine, rounding=rounding)
    return planned._plan([chain])
