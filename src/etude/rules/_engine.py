"""The one loop: a torch optimizer that plays any chain on stacks of parameters."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from etude._held import refuse_orphans, register
from etude.rules._averaged import Averaging
from etude.rules._bucket import LOW, Bucket, Work, layout, works
from etude.rules._checkpoint import aligned, fitting
from etude.rules._groups import names_of as names_of
from etude.rules._groups import refuse, same_knobs, split_of
from etude.rules._kernel import Kernel, NoKernel, packed, play, run
from etude.rules._member import Member
from etude.rules._numbers import Moment, multiplier, only_allocates, told
from etude.rules._rule import Bag, Chain
from etude.rules._sharded import Owned, assign, entries, exchange, spans, stacks
from etude.rules._split import cut
from etude.rules._spread import local, looks_wide
from etude.rules._spread import spread as spread_of
from etude.rules._totals import totals

Engine = Literal["eager", "compiled", "reference"]
Rounding = Literal["kahan", "stochastic", "nearest"]
log = logging.getLogger("etude")

_OWN_KEYS = {"params", "param_names", "rule", "owners", "split", "initial_lr", "name"}
"""What a param group may hold beside its rule's knobs when it is given."""


class RuleOptimizer(Averaging):
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
        self._first_lr: list[Any] = []
        self._owners: dict[Tensor, int] = {}
        self._away = {}
        self._coming = [] if isinstance(rules, Chain) else list(rules)
        self._known = {rule.name: rule for rule in ([rules] if isinstance(rules, Chain) else rules)}
        self._forget()
        first = next(iter(self._known.values()))
        super().__init__(params, {"rule": first.name, **first.knobs()})
        register(self)

    def _forget(self) -> None:
        """Drop the buckets. They are a cache over ``state`` and the groups, and the next step builds them again."""
        self._buckets: list[Bucket] | None = None
        self._planned: list[int] = []
        self._waiting: list[Tensor] = []
        self._owned: dict[Tensor, tuple[Owned, int]] = {}
        self._loss = 0.0
        self._made: dict[int, tuple[dict[str, Any], Chain]] = {}

    # -- groups and state -----------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; a key that is no knob of the group's rule raises, and with several rules ``rule`` names one."""
        rule = self._coming.pop(0) if self._coming else self._named(param_group.get("rule"))
        knobs = rule.knobs()
        if unknown := set(param_group) - set(knobs) - _OWN_KEYS:
            raise ValueError(f"{rule.name} has no knob {', '.join(sorted(unknown))}; its knobs: {', '.join(knobs)}")
        rule.remake({k: param_group.get(k, v) for k, v in knobs.items()})  # out of range raises here, not in a step
        before, params = list(self.param_groups), param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        if before and "param_names" in before[0] and params and isinstance(params[0], Tensor):
            params = [(f"{len(before)}.{i}", p) for i, p in enumerate(params)]  # torch wants names for all or for none
        super().add_param_group({**knobs, **param_group, "params": params, "rule": rule.name})
        group = self.param_groups[-1]
        for key in set(self.defaults) - set(knobs) - _OWN_KEYS:
            group.pop(key, None)  # torch fills in the first rule's knobs; this group has its own
        try:
            refuse(group, len(before), rule)
        except (ValueError, TypeError):
            self.param_groups[:] = before
            raise
        self.rules.append(rule)
        self._first_lr.append(group.get("lr", 1.0))
        self._forget()

    def _named(self, name: str | None) -> Chain:
        """The rule that a late group asks for."""
        if name is None and len(self._known) == 1:
            return next(iter(self._known.values()))
        if name not in self._known:
            plays = ", ".join(self._known)
            raise ValueError(f"rule={name!r}: this optimizer plays {plays}; say which serves the new group")
        return self._known[name]

    def rule(self, group: int) -> Chain:
        """The group's chain at the knobs it has now; made anew only when one of them changed."""
        knobs = {k: self.param_groups[group][k] for k in self.rules[group].knobs()}
        made = self._made.get(group)
        if made is None or not same_knobs(made[0], knobs):
            now = self.rules[group].remake(knobs)
            if made is not None and made[1].structure != now.structure:
                self._forget()  # another structure keeps other state
            self._made[group] = (knobs, now)
        return self._made[group][1]

    def chains(self) -> list[Chain]:
        """Every group's chain at the knobs it has now."""
        return [self.rule(i) for i in range(len(self.param_groups))]

    def _plan(self, chains: Sequence[Chain]) -> list[Bucket]:
        """Put every parameter into a bucket, and make ``state`` views into the buckets, keeping what it held."""
        if self._buckets is not None and self._stands(self._buckets):
            return self._buckets
        made, self._waiting = dict(self._made), []
        found: dict[Any, Bucket] = {}
        for i, (group, chain) in enumerate(zip(self.param_groups, chains)):
            for j, (name, p) in enumerate(zip(names_of(group, i), group["params"])):
                if not p.requires_grad and p.grad is None and p not in self.state:
                    self._waiting.append(p)  # frozen: no state until it is thawed
                elif p.numel():
                    key, bucket = self._place(i, j, chain, p)
                    owner = group["owners"][j] if "owners" in group else 0
                    split = split_of(group, j) if chain.width == "matrix" else None
                    found.setdefault(key, bucket).members.append(Member(p, name, owner, (i, j), split))
        self._assign(chains)
        self._owned = stacks(found.values(), chains, self._owners)
        for bucket in found.values():
            bucket.allocate(chains[bucket.group], kahan=self.rounding == "kahan")
            if self.resident and bucket.layout == "flat":
                bucket.settle()
        placed = [(m.place, i, bucket) for bucket in found.values() for i, m in enumerate(bucket.members)]
        for _, i, bucket in sorted(placed, key=lambda x: x[0]):  # in one order in all processes
            m = bucket.members[i]
            apart = entries(chains[bucket.group], m, self._owned) if bucket.spread else []
            self.state[m.p] = bucket.show(i, self.state.pop(m.p, {}), apart)
        self._made, self._buckets = made, list(found.values())
        self._planned = [id(p) for g in self.param_groups for p in g["params"]]
        return self._buckets

    def _assign(self, chains: Sequence[Chain]) -> None:
        """An owner for every sharded tensor whose rule looks at it as a whole; those that have one keep it."""
        whole = [g["params"] if any(map(looks_wide, c.parts)) else [] for g, c in zip(self.param_groups, chains)]
        assign(self._owners, [p for ps in whole for p in ps if p.numel() and spread_of(p)])

    def _place(self, i: int, j: int, chain: Chain, p: Tensor) -> tuple[Any, Bucket]:
        """The key and the empty bucket for parameter j of group i."""
        here, real = spread_of(p), self.engine == "reference"
        kind, shared = layout(chain.width, local(p).numel(), real)
        if here is not None:
            kind = "rows" if any(part.per_member and not looks_wide(part) for part in chain.parts) else "flat"
        dtype = torch.float64 if real else torch.float32 if p.dtype in LOW else p.dtype
        dtype = dtype.to_real() if dtype.is_complex else dtype
        shape: Any = None if kind == "flat" else local(p).shape
        split = split_of(self.param_groups[i], j)
        if split and here is None and chain.width == "matrix":
            shape = (*cut(p, split).shape[1:], "split")
        movable = self.resident and p.is_contiguous()
        key = (i, kind, p.dtype, p.device, shape, movable, here) if shared else (i, j)
        return key, Bucket(i, kind, dtype, [], here)

    def _stands(self, buckets: Sequence[Bucket]) -> bool:
        """Whether the plan still fits: users thaw, replace and move parameters, and edit the state."""
        return (
            not any(p.requires_grad or p.grad is not None for p in self._waiting)
            and self._planned == [id(p) for g in self.param_groups for p in g["params"]]
            and all(b.stands(self.state) for b in buckets)
        )

    # -- the step -------------------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if self._away:
            raise ValueError("step() while the weights to evaluate are in the model: call train() first")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refuse_orphans(self)
        chains = self.chains()
        if closure is None and not self.state and only_allocates(self.param_groups, chains):
            self._plan(chains)
            return None
        self._loss = told(loss, chains)
        buckets = self._plan(chains)
        moments: dict[Any, Moment] = {}
        for arm in _arms(chains):
            mine = (b for b in buckets if b.group in arm)
            if self._needs_phases(arm, chains, buckets):
                self._in_phases([w for b in mine for w in works(b, self.maximize)], chains, moments)
            else:
                for bucket in mine:
                    if not self._again(bucket, moments):
                        self._alone(bucket, chains[bucket.group], moments)
        if any("hessian" in part.reads for chain in chains for part in chain.parts):
            for group in self.param_groups:
                for p in group["params"]:
                    p.hessian = None  # told once
        return loss

    def _moment(self, group: int, t: int, device: torch.device, seen: dict[Any, Moment]) -> Moment:
        """The numbers of a group's parts at a step (fields, what depends on t, the schedule's multiplier), once."""
        key = (group, t, device)
        if key not in seen:
            knobs = self.param_groups[group]
            lr = knobs.get("lr", 1.0)
            schedule = multiplier(lr, knobs.get("initial_lr", self._first_lr[group]))
            step = {"t": float(t), "multiplier": schedule, "loss": self._loss}
            seen[key] = Moment.of(self.rule(group), step, device if self.engine == "compiled" else None)
        return seen[key]

    def _alone(self, bucket: Bucket, chain: Chain, moments: dict[Any, Moment]) -> None:
        """A step of a bucket whose rule needs nothing of other buckets."""
        for work in works(bucket, self.maximize):
            moment = self._moment(bucket.group, work.t, work.w.device, moments)
            work.numbers, work.packed = moment.of_work(work, chain), moment.floats
            kernel = self._finish(work, chain, 0)
            keeps = work.in_place and chain.steady and not moment.each
            bucket.ready = work.ready(kernel, moment.names) if kernel and keeps else None

    def _again(self, bucket: Bucket, moments: dict[Any, Moment]) -> bool:
        """A further step of a large tensor by the kernel of its last, without asking what cannot have changed."""
        ready, p = bucket.ready, bucket.members[0].p
        if ready is None or self.maximize or p.grad is None or not ready.fits(p, p.grad):
            return False
        moment = self._moment(bucket.group, int(bucket.steps) + 1, bucket.made_for[1], moments)
        if moment.each or moment.floats is None or moment.names != ready.names:
            return False
        ready.play(p.grad, moment.floats)
        bucket.steps += 1
        return True

    def _in_phases(self, all_works: list[Work], chains: Sequence[Chain], moments: dict[Any, Moment]) -> None:
        """A chain with model-wide parts: every work up to such a part, one sum per owner model, then on."""
        if not all_works:
            return
        for work in all_works:
            moment = self._moment(work.bucket.group, work.t, work.w.device, moments)
            numbers = moment.of_work(work, chains[work.bucket.group])
            work.numbers = [dict(n) for n in numbers]  # each work gets its own totals
        parts = chains[all_works[0].bucket.group].parts
        for span in spans(parts):
            i, part = span.start, parts[span.start]
            waiting = all_works if part.width == "model" else [w for w in all_works if w.bucket.spread]
            if not waiting or not (part.width == "model" or looks_wide(part)):
                continue
            for work in waiting:
                self._advance(work, chains, i)
            if part.width != "model":
                exchange(waiting, chains, span, self._owners, self._owned)
                continue
            partials = []
            for work in waiting:
                s, c = Bag(work.state[i]), Bag(work.numbers[i])
                told = chains[work.bucket.group].parts[i].partial(work.u, work.g, work.w, s, c)
                partials.append({"total": told} if isinstance(told, Tensor) else told)
            for name in partials[0]:
                found = totals(waiting, [p[name] for p in partials], part.gather)
                for work, total in zip(waiting, found):
                    work.numbers[i][name] = total
        for work in all_works:
            self._finish(work, chains[work.bucket.group], work.done)

    def _needs_phases(self, arm: Sequence[int], chains: Sequence[Chain], buckets: Sequence[Bucket]) -> bool:
        """Whether some of its parts need more than one work's own numbers: of a whole model, or of other processes."""
        parts = chains[arm[0]].parts
        sharded = any(b.spread for b in buckets if b.group in arm)
        return any(part.width == "model" or (sharded and looks_wide(part)) for part in parts)

    def _advance(self, work: Work, chains: Sequence[Chain], stop: int) -> None:
        """Play the parts before ``stop`` that have not been played yet."""
        span = slice(work.done, stop)
        parts = chains[work.bucket.group].parts[span]
        work.u, work.g = run(parts, work.u, work.g, work.w, work.state[span], work.numbers[span])
        work.done = stop

    def _finish(self, work: Work, chain: Chain, start: int) -> Kernel | None:
        """The parts from ``start`` on, w ← w − u, and the weights back where they live; the kernel, if one did it."""
        plain = self.engine != "compiled" or chain.plain or work.bucket.plain or not work.w.numel()
        kernel = None if plain else self._compiled(work, chain, start)
        if kernel is None:
            parts, states, numbers = chain.parts[start:], work.state[start:-1], work.numbers[start:]
            work.w.sub_(run(parts, work.u, work.g, work.w, states, numbers)[0])
        work.land(self.rounding)
        return kernel

    def _compiled(self, work: Work, chain: Chain, start: int) -> Kernel | None:
        """Play the parts as one kernel. Where none can be built for this layout, say so once and go on eagerly."""
        states, numbers = work.state[start:-1], work.numbers[start:]
        floats = packed(numbers, work.w.device) if work.packed is None else work.packed
        u, parts = work.u if start else None, chain.parts[start:]
        try:
            return play(chain.name, chain.structure[start:], parts, u, work.g, work.w, states, numbers, floats)
        except NoKernel as error:
            if not any(b.plain for b in self._buckets or ()):
                log.warning("etude: no compiled kernel for %s (%s); eager goes on", chain.name, error)
            work.bucket.plain = True
            return None

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle keep: everything but the buckets and kernels, which are caches."""
        keep = (
            "rules",
            "engine",
            "rounding",
            "resident",
            "maximize",
            "_coming",
            "_known",
            "_first_lr",
            "_away",
            "_owners",
        )
        return {**super().__getstate__(), **{k: getattr(self, k) for k in keep}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()
        register(self)

    def state_dict(self) -> dict[str, Any]:
        """Torch's own form: plain tensors under integer keys, groups with names; ``weights_only``-loadable."""
        self._plan(self.chains())
        return self._told_away(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue bit for bit: types are kept as saved; names, where both sides have them, decide what goes where.

        Nothing is changed when the checkpoint does not fit.
        """
        state_dict = dict(state_dict)
        for pre in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre(self, state_dict) or state_dict
        chains, mine = self.chains(), self.param_groups
        buckets = self._plan(chains)
        groups = aligned(mine, state_dict["param_groups"], self.rules)
        state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        for group, theirs in zip(mine, groups):
            for p, index in zip(group["params"], theirs.pop("params")):
                entry = state_dict["state"].get(index, {})
                state[p] = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in entry.items()}
        away = {p: entry.pop("trained") for p, entry in state.items() if "trained" in entry}
        then = [rule.remake({k: g[k] for k in rule.knobs()}) for rule, g in zip(self.rules, groups)]
        for bucket in buckets:
            chain, same = then[bucket.group], then[bucket.group].structure == chains[bucket.group].structure
            for m in bucket.members:
                state[m.p] = {k: v for k, v in state[m.p].items() if k not in m.elsewhere}
                state[m.p] = fitting(m.name, state[m.p], set(m.shown) if same else bucket.names(chain, m), chain)
        loaded = [{**theirs, "params": group["params"]} for group, theirs in zip(mine, groups)]
        self.__setstate__({"state": state, "param_groups": loaded})
        self._plan(self.chains())
        self._away = away
        self.train()
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)


def _arms(chains: Sequence[Chain]) -> list[list[int]]:
    """Groups whose chains have one structure, so that a model-wide sum spans them."""
    arms: dict[Any, list[int]] = {}
    for i, chain in enumerate(chains):
        arms.setdefault(chain.structure, []).append(i)
    return list(arms.values())


def state_bytes(members: Iterable[Member]) -> int:
    """Bytes of state in this process: the parts' tensors, the step counts, what rounding lost."""
    return sum(local(x).nbytes for m in members for x in m.shown.values())
