"""The one loop: a torch optimizer that plays any chain on stacks of parameters."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from etude.rules._bucket import LOW, Bucket, Member, Work, layout, totals, works
from etude.rules._kernel import NoKernel, Numbers, compiled, packed, run
from etude.rules._rule import Bag, Chain

Engine = Literal["eager", "compiled", "reference"]
Rounding = Literal["kahan", "stochastic", "nearest"]
log = logging.getLogger("etude")

_OWN_KEYS = {"params", "param_names", "rule", "owners", "initial_lr", "name"}
"""What a param group may hold beside its rule's knobs."""


class RuleOptimizer(torch.optim.Optimizer):
    """A ``torch.optim.Optimizer`` that plays one chain per param group; the groups' knobs are the truth.

    ``engine``: ``eager`` stacks; ``compiled``, one kernel per rule; ``reference``, a plain float64 loop.
    ``rounding``, for bfloat16 and float16 weights: ``kahan`` keeps what rounding loses, ``stochastic`` draws it,
    ``nearest`` forgets it, as torch does. ``resident``: small weights live in their flat buffer, never gathered.
    """

    def __init__(
        self, params: Any, rules: Chain | Sequence[Chain], *, engine: Engine = "eager", rounding: Rounding = "kahan",
        resident: bool = False, maximize: bool = False,
    ) -> None:  # fmt: skip
        for given, choices in ((engine, Engine), (rounding, Rounding)):
            if given not in get_args(choices):
                raise ValueError(f"{given!r} is none of {', '.join(get_args(choices))}")
        self.engine, self.rounding, self.resident, self.maximize = engine, rounding, resident, maximize
        self.rules: list[Chain] = []
        self._coming = [rules] if isinstance(rules, Chain) else list(rules)
        self._forget()
        super().__init__(params, {"rule": self._coming[0].name, **self._coming[0].knobs()})

    def _forget(self) -> None:
        """Drop the buckets. They are a cache over ``state`` and the groups, and the next step builds them again."""
        self._buckets: list[Bucket] | None = None
        self._made: dict[int, tuple[dict[str, Any], Chain]] = {}

    # -- groups and state -----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a key that is no knob of the group's rule raises."""
        rule = self._coming.pop(0) if len(self._coming) > 1 else self._coming[0]
        knobs = rule.knobs()
        if unknown := set(param_group) - set(knobs) - _OWN_KEYS:
            raise ValueError(f"{rule.name} has no knob {', '.join(sorted(unknown))}; its knobs: {', '.join(knobs)}")
        rule.remake({k: param_group.get(k, v) for k, v in knobs.items()})  # out of range raises here, not in a step
        super().add_param_group({"rule": rule.name, **knobs, **param_group})
        group = self.param_groups[-1]
        for key in set(self.defaults) - set(knobs) - _OWN_KEYS:
            group.pop(key, None)  # torch fills in the first rule's knobs; this group has its own
        names = group.get("param_names", [f"{len(self.param_groups) - 1}.{i}" for i in range(len(group["params"]))])
        for name, p in zip(names, group["params"]):
            _check(name, p, rule)
        self.rules.append(rule)
        self._forget()

    def rule(self, group: int) -> Chain:
        """The group's chain at the knobs it has now; made anew only when one of them changed."""
        knobs = {k: self.param_groups[group][k] for k in self.rules[group].knobs()}
        made = self._made.get(group)
        if made is None or not _same(made[0], knobs):
            now = self.rules[group].remake(knobs)
            if made is not None and made[1].structure != now.structure:
                self._forget()  # another structure keeps other state
            self._made[group] = (knobs, now)
        return self._made[group][1]

    def _plan(self, chains: Sequence[Chain]) -> list[Bucket]:
        """Put every parameter into a bucket, and make ``state`` views into the buckets, keeping what it held."""
        if self._buckets is not None and all(b.settled() for b in self._buckets):
            return self._buckets
        found: dict[Any, Bucket] = {}
        for i, (group, chain) in enumerate(zip(self.param_groups, chains)):
            names = group.get("param_names", [f"{i}.{j}" for j in range(len(group["params"]))])
            for j, (name, p) in enumerate(zip(names, group["params"])):
                if p.numel() == 0:
                    continue
                kind, shared = layout(chain.width, p.numel(), self.engine == "reference")
                dtype = torch.float64 if self.engine == "reference" else torch.float32 if p.dtype in LOW else p.dtype
                dtype = dtype.to_real() if dtype.is_complex else dtype
                shape = p.shape if shared and kind != "flat" else None
                key = (i, kind, p.dtype, p.device, shape) if shared else (i, j)
                owner = group["owners"][j] if "owners" in group else 0
                member = Member(p, name, owner)
                found.setdefault(key, Bucket(i, kind, dtype, [])).members.append(member)
        for bucket in found.values():
            bucket.allocate(chains[bucket.group], kahan=self.rounding == "kahan")
            if self.resident and bucket.layout == "flat":
                bucket.settle()
            for i, member in enumerate(bucket.members):
                views = bucket.views(i)
                for key, value in self.state.get(member.p, {}).items():
                    if key in views:
                        views[key].copy_(value)
                member.t = int(bucket.steps[i]) if bucket.steps.device.type != "meta" else 0
                self.state[member.p] = views
        self._buckets = list(found.values())
        return self._buckets

    # -- the step -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        chains = [self.rule(i) for i in range(len(self.param_groups))]
        buckets = self._plan(chains)
        contexts: dict[Any, Any] = {}
        for arm in _arms(chains):
            mine = (b for b in buckets if b.group in arm)
            if any(part.width == "model" for part in chains[arm[0]].parts):
                self._in_phases([w for b in mine for w in works(b, self.maximize)], chains, contexts)
            else:
                for bucket in mine:
                    for work in works(bucket, self.maximize):
                        work.numbers, work.packed = self._context(work, chains[bucket.group], contexts)
                        self._finish(work, chains[bucket.group], 0)
        return loss

    def _context(self, work: Work, chain: Chain, seen: dict[Any, Any]) -> tuple[Numbers, Tensor | None]:
        """The parts' numbers at this step (fields, what depends on t, the schedule's multiplier), once per group."""
        key = (work.bucket.group, work.t)
        if key not in seen:
            group = self.param_groups[work.bucket.group]
            lr = group.get("lr", 1.0)
            initial = group.get("initial_lr", lr)
            shared = {"t": float(work.t), "multiplier": lr / initial if initial else 0.0}
            numbers = [
                {**part.numbers(), **part.clock(work.t), **{k: shared[k] for k in part.reads}} for part in chain.parts
            ]
            seen[key] = (numbers, packed(numbers) if self.engine == "compiled" else None)
        found: tuple[Numbers, Tensor | None] = seen[key]
        return found

    def _in_phases(self, all_works: list[Work], chains: Sequence[Chain], contexts: dict[Any, Any]) -> None:
        """A chain with model-wide parts: every work up to such a part, one sum per owner model, then on."""
        if not all_works:
            return
        for work in all_works:
            numbers, _ = self._context(work, chains[work.bucket.group], contexts)
            work.numbers = [dict(n) for n in numbers]  # each work gets its own totals
        start = 0
        for i, part in enumerate(chains[all_works[0].bucket.group].parts):
            if part.width != "model":
                continue
            partials = []
            for work in all_works:
                mine = chains[work.bucket.group].parts
                span = slice(start, i)
                work.u, work.g = run(mine[span], work.u, work.g, work.w, work.state[span], work.numbers[span])
                s, c = Bag(work.state[i]), Bag(work.numbers[i])
                partials.append(mine[i].partial(work.u, work.g, work.w, s, c))
            for work, total in zip(all_works, totals(all_works, partials)):
                work.numbers[i]["total"] = total
            start = i
        for work in all_works:
            self._finish(work, chains[work.bucket.group], start)

    def _finish(self, work: Work, chain: Chain, start: int) -> None:
        """The parts from ``start`` on, w ← w − u, and the weights back where they live."""
        if self.engine != "compiled" or work.bucket.plain or not self._compiled(work, chain, start):
            parts, states, numbers = chain.parts[start:], work.state[start:-1], work.numbers[start:]
            work.w.sub_(run(parts, work.u, work.g, work.w, states, numbers)[0])
        work.land(self.rounding)

    def _compiled(self, work: Work, chain: Chain, start: int) -> bool:
        """Play the parts as one kernel. Where none can be built for this layout, say so once and go on eagerly."""
        states, numbers = work.state[start:-1], work.numbers[start:]
        floats = packed(numbers) if work.packed is None else work.packed
        kernel = compiled(chain.name, chain.structure[start:], chain.parts[start:], states, numbers, fresh=not start)
        tensors = [x for given in (*states, *numbers) for x in given.values() if isinstance(x, Tensor)]
        try:
            kernel(work.g, work.w, floats, *tensors, *((work.u,) if start else ()))
        except NoKernel as error:
            if not any(b.plain for b in self._buckets or ()):
                log.warning("etude: no compiled kernel for %s (%s); eager goes on", chain.name, error)
            work.bucket.plain = True
            return False
        return True

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: everything but the buckets and kernels, which are caches."""
        keep = ("rules", "engine", "rounding", "resident", "maximize", "_coming")
        return {**super().__getstate__(), **{k: getattr(self, k) for k in keep}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """Torch's own form: plain tensors under integer keys, groups with names; ``weights_only``-loadable."""
        self._plan([self.rule(i) for i in range(len(self.param_groups))])
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit: types are kept as saved; names, where both sides have them, decide what goes where."""
        saved = [dict(g) for g in state_dict["param_groups"]]
        if len(saved) != len(self.param_groups):
            raise ValueError(f"the checkpoint has {len(saved)} param groups, this optimizer {len(self.param_groups)}")
        for i, (mine, theirs) in enumerate(zip(self.param_groups, saved)):
            if theirs.get("rule", mine["rule"]) != mine["rule"]:
                raise ValueError(
                    f"group {i}: the checkpoint is of {theirs['rule']}, this optimizer plays {mine['rule']}"
                )
            saved[i] = _aligned(i, mine, theirs, self.rules[i])
        super().load_state_dict({"state": {}, "param_groups": saved})
        self.state.clear()
        for mine, theirs in zip(self.param_groups, saved):
            for p, index in zip(mine["params"], theirs["params"]):
                entry = state_dict["state"].get(index, {})
                self.state[p] = {k: v.to(p.device, copy=True) if isinstance(v, Tensor) else v for k, v in entry.items()}
        held = {id(p): set(s) for p, s in self.state.items()}
        for bucket in self._plan([self.rule(i) for i in range(len(self.param_groups))]):
            for i, m in enumerate(bucket.members):
                views = set(bucket.views(i))
                if held[id(m.p)] - views or (held[id(m.p)] and views - held[id(m.p)] - {"compensation"}):
                    raise ValueError(
                        f"{m.name}: the checkpoint holds {', '.join(sorted(held[id(m.p)]))}; "
                        f"{self.rules[bucket.group].name} keeps {', '.join(sorted(views))}"
                    )


def _aligned(i: int, mine: dict[str, Any], theirs: dict[str, Any], rule: Chain) -> dict[str, Any]:
    """The saved group in this optimizer's order of parameters, with this rule's knobs alone."""
    params = list(theirs["params"])
    if "param_names" in mine and "param_names" in theirs:
        at = dict(zip(theirs["param_names"], params))
        if set(at) != set(mine["param_names"]):
            odd = sorted(set(at) ^ set(mine["param_names"]))
            raise ValueError(f"group {i}: only one of checkpoint and optimizer has {', '.join(odd[:5])}")
        params = [at[name] for name in mine["param_names"]]
    elif len(params) != len(mine["params"]):
        raise ValueError(f"group {i}: the checkpoint has {len(params)} parameters, the optimizer {len(mine['params'])}")
    kept = {k: theirs[k] for k in (*rule.knobs(), "initial_lr") if k in theirs}
    return {**{k: v for k, v in mine.items() if k != "params"}, **kept, "params": params}


def _arms(chains: Sequence[Chain]) -> list[list[int]]:
    """Groups whose chains have one structure, so that a model-wide sum spans them."""
    arms: dict[Any, list[int]] = {}
    for i, chain in enumerate(chains):
        arms.setdefault(chain.structure, []).append(i)
    return list(arms.values())


def _check(name: str, p: Tensor, rule: Chain) -> None:
    """Refuse, by name, what the rule cannot serve."""
    if type(p).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor; etude's rules do not update sharded parameters yet")
    if rule.width == "matrix" and (p.ndim < 2 or p.is_complex()):
        what = "is complex" if p.is_complex() else f"has shape {tuple(p.shape)}"
        raise ValueError(
            f"{rule.name} is for real matrices and {name} {what}: "
            f"give the model, or route(matrices={rule.name}(), rest=adamw())"
        )


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two sets of knobs are the same; a tensor is the same only if it is that very tensor, unchanged."""
    return all(
        x is y if isinstance(x, Tensor) or isinstance(y, Tensor) else x == y for x, y in zip(a.values(), b.values())
    )


def state_bytes(buckets: Iterable[Bucket]) -> int:
    """Bytes of state in the buckets: the parts' tensors, the step counts, what rounding lost."""
    return sum(
        x.numel() * x.element_size() for b in buckets for entry in (*b.state, {"step": b.steps}) for x in entry.values()
    )
