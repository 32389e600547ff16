"""Cells of one contender trained as one program: the runs of `loop.train`, up to rounding, many at a time.

What differs from the plain loop is said here. Rounding: products of stacks round in another order. Dropout: each cell
draws masks of its own, which are not those of the loop. Time: a cell's seconds are the loop's, as measured by the probe
(R7); those of a batched run would not be its own.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from etude import after
from etude.race._errors import one_line
from etude.race._model import Cell, Outcome
from etude.race._stacks import Named, Stacks, Unfit
from etude.race._traced import Program
from etude.race.loop import Point, Run, data_order, diverged, marks, stream_seed, train
from etude.race.task import Factory, Task, as_batch, batches_of, called, forward, to_device
from etude.rules import RuleOptimizer

EVALUATED = 2**24
"""Numbers of input that are evaluated at a time, over all models."""
_PLAIN = frozenset(nn.Module().__dict__)
_PROGRAMS: dict[Any, Program] = {}
"""What this process has built, by all that decides the program."""


@dataclass(frozen=True)
class How:
    """How the cells of a contender are trained, decided once by the probe and kept in the ledger.

    ``engine``: ``loop | population``. ``size``: cells of one program. ``compiled``: whether it is lowered to kernels.
    ``step_seconds``, ``state_bytes``: of one run of the plain loop. ``why``: in one line. ``seconds``: of one run.
    """

    engine: str = "loop"
    size: int = 1
    compiled: bool = False
    step_seconds: float = 0.0
    state_bytes: int = 0
    why: str = ""
    seconds: float = 0.0


def train_cells(
    factory: Factory, cells: Sequence[Cell], how: How, *, steps: int, device: str = "cpu"
) -> tuple[list[Outcome], str]:
    """The outcomes of the cells, in their order, and why the plain loop had to train them, or ""."""
    try:
        return Population(factory, cells, how, steps=steps, device=device).train(), ""
    except Exception as error:
        why = one_line(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {one_line(error)}"
    return [train(factory, cell, steps=steps, device=device) for cell in cells], why


class Population:
    """The cells set up as `loop.Run` sets each up, and then taken together. A program of more rows repeats the last."""

    def __init__(
        self, factory: Factory, cells: Sequence[Cell], how: How, *, steps: int, device: str, training: bool = True
    ) -> None:
        self.cells, self.how, self.steps, self.device = list(cells), how, steps, device
        rows = [*cells, *[cells[-1]] * (how.size - len(cells) if how.compiled else 0)]
        runs = [Run(factory, cell, steps=steps, device=device) for cell in rows]
        self.task, self.model = runs[0].task, runs[0].model
        _refuse_unlike(runs)
        for run in runs:
            run.model.train(training)
        optimizers = [run.optimizer for run in runs if isinstance(run.optimizer, RuleOptimizer)]
        if len(optimizers) < len(runs):
            raise Unfit("the recipe's optimizer is none of etude's rules")
        self.stacks = Stacks([run.model for run in runs], optimizers, self.task.training_loss, runs[0].gradient)
        self.bound = [_Together([run.bound[i] for run in runs]) for i in range(len(runs[0].bound))]
        self.multiplier, self.taken, self.one_by_one = runs[0].multiplier, 0, False
        self.feed = _feed(runs, rows, device)
        self.ahead: list[Any] = []
        key, (inputs, targets) = self._key(runs), self._peek()
        before = _attributes(self.model)
        with _quiet():
            self.stacks.settle(inputs, targets)
            if before == _attributes(self.model):  # a model that counts its calls must have its Python run at each
                self._build(key, inputs, targets)
        torch.manual_seed(stream_seed(cells[0].seed, "noise"))  # whether it was built or found must change no mask

    def _key(self, runs: list[Run]) -> Any:
        shapes = [(n, p.shape, p.dtype) for n, p in self.model.named_parameters()]
        more = tuple(name for name, _ in self.cells[0].more)
        return (
            self.cells[0].contender, more, len(runs), self.how.compiled, self.device, repr(shapes), repr(self.model),
            _attributes(self.model), _closure(self.task), self.model.training, torch.get_num_threads(),
        )  # fmt: skip

    def _peek(self) -> Any:
        """The next batch, left where it is."""
        if not self.ahead:
            self.ahead.append(next(self.feed))
        return self.ahead[0]

    def _build(self, key: Any, inputs: Any, targets: Any) -> None:
        key = (key, str([(x.shape, x.dtype) for x in tree_leaves((inputs, targets))]), self.stacks.signature())
        if key in _PROGRAMS:
            self.stacks.program = _PROGRAMS[key]
            return
        self.stacks.build(inputs, targets, compiled=self.how.compiled)
        assert self.stacks.program is not None
        _PROGRAMS[key] = self.stacks.program

    # -- training ---------------------------------------------------------------------------------------------------

    def step(self) -> Tensor:
        """One step of every row; the losses at its start.  [p]"""
        inputs, targets = self.ahead.pop() if self.ahead else next(self.feed)
        multiplier, self.taken = self.multiplier(self.taken), self.taken + 1
        with _quiet() if self.stacks.program is None else nullcontext():
            losses = self.stacks.step(inputs, targets, self.taken, multiplier)
        for bound in self.bound:
            bound(self.stacks.weights())
        return losses

    def train(self) -> list[Outcome]:
        """Every cell to its end. A row that has diverged becomes a copy of one that has not, and is not looked at."""
        rows, due = range(len(self.cells)), marks(self.steps)
        alive, first = list(rows), [math.nan for _ in rows]
        curves: list[list[Point]] = [[] for _ in rows]
        reasons, metrics = ["" for _ in rows], [math.nan for _ in rows]
        losses: list[Tensor] = []
        for step in range(1, self.steps + 1):
            losses.append(self.step())
            if step == 1:
                first = losses[0].tolist()
            if step not in due:
                continue
            means, values = torch.stack(losses).mean(0).tolist(), self.measure(self.task.valid)
            losses.clear()
            for i in list(alive):
                curves[i].append((step, self.how.step_seconds * step, means[i], values[i]))
                metrics[i] = values[i]
                if why := diverged(first[i], curves[i]):
                    reasons[i] = why
                    alive.remove(i)
            if not alive:
                break
            for i in set(rows) - set(alive):
                self._replace(i, alive[0])
        if self.task.test is not None and any(self.cells[i].stage != "tune" for i in alive):
            judged = self.measure(self.task.test)
            metrics = [m if c.stage == "tune" else judged[i] for i, (m, c) in enumerate(zip(metrics, self.cells))]
        return [self._outcome(cell, *found) for cell, *found in zip(self.cells, metrics, reasons, curves)]

    def _replace(self, row: int, by: int) -> None:
        self.stacks.copy_row(by, row)
        for bound in self.bound:
            for x in bound.kept.values():
                x[row] = x[by]

    def _outcome(self, cell: Cell, metric: Any, reason: Any, curve: Any) -> Outcome:
        if not reason and not math.isfinite(metric):
            reason = f"the metric is {metric} after the last step"
        seconds = self.how.step_seconds * curve[-1][0]
        value = None if reason else metric
        return Outcome(cell, value, reason, tuple(curve), seconds, self.how.step_seconds, self.how.state_bytes)

    # -- evaluation -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure(self, data: Any) -> list[float]:
        """The task's metric of every cell, as `Task.measure` has it, at its averaged weights where there are any."""
        averages = [b.kept for b in self.bound if b.averages]
        weights = {**self.stacks.weights(), **(averages[-1] if averages else {})}
        weights = {n: w.to(self.stacks.dtypes[n]) for n, w in weights.items()}
        totals, count = [0.0 for _ in self.cells], 0
        was_training = self.model.training
        self.model.eval()
        for inputs, targets in batches_of(data):
            inputs, targets = to_device(inputs, self.device), to_device(targets, self.device)
            for i, output in enumerate(self._outputs(weights, inputs)):
                value = self.task.value(output, targets)
                totals[i] += value.double().mean().item() * len(targets)
            count += len(targets)
        self.model.train(was_training)
        return [total / count for total in totals]

    def _outputs(self, weights: Named, inputs: Any) -> Iterator[Any]:
        """What each cell's model says of the inputs; one after another where they cannot be asked together."""

        def ask(params: Named, buffers: Named) -> Any:
            return forward(called(self.model, params, buffers), inputs)

        held = (weights, self.stacks.buffers)
        if not self.one_by_one:
            per = max(1, EVALUATED // max(1, sum(x.numel() for x in tree_leaves(inputs) if isinstance(x, Tensor))))
            try:
                with _quiet():
                    together = torch.vmap(ask, randomness="different", chunk_size=per)(*held)
            except Exception:
                self.one_by_one = True
            else:
                yield from (tree_map(lambda x: x[i], together) for i in range(len(self.cells)))
                return
        for i in range(len(self.cells)):
            yield ask(*({n: x[i] for n, x in part.items()} for part in held))


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns where it takes an operation row by row; the probe has measured what that costs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class _Together:
    """One value of ``after`` at work on every row: its own step, row by row in one call."""

    def __init__(self, bound: Sequence[after.Bound]) -> None:
        self.value, self.t, self.averages = bound[0].value, 0, isinstance(bound[0], after.Averaged)
        self.kept = {n: torch.stack([b.kept[n] for b in bound]) for n in bound[0].kept}

    @torch.no_grad()
    def __call__(self, weights: Any) -> None:
        self.t += 1
        if self.averages:  # each number alone, so a stack is as good as its rows
            self.value.step(weights, self.kept, self.t)
            return

        def one(weights: Any, kept: Named) -> Tensor:
            self.value.step(weights, kept, self.t)
            return torch.zeros(())

        torch.vmap(one)(weights, self.kept)


# -- data -------------------------------------------------------------------------------------------------------------


def _feed(runs: Sequence[Run], rows: Sequence[Cell], device: str) -> Iterator[Any]:
    """The batches of every row, [p, batch, …]: for each seed the very stream of the plain loop (R1)."""
    task, seeds = runs[0].task, list(dict.fromkeys(cell.seed for cell in rows))
    place = torch.tensor([seeds.index(cell.seed) for cell in rows])
    if callable(task.train):
        streams = [next(run.stream for run, cell in zip(runs, rows) if cell.seed == seed) for seed in seeds]
        return _streamed(streams, place.tolist(), device)
    orders = [task.rows(data_order(seed)) for seed in seeds]
    return _drawn(orders, place, to_device(as_batch(task.train), device))


def _drawn(orders: list[Iterator[Tensor]], place: Tensor, data: Any) -> Iterator[Any]:
    while True:
        rows = torch.stack([next(order) for order in orders])
        rows = (rows if len(orders) == len(place) else rows[place]).to(data[1].device)
        yield tree_map(lambda x: x[rows], data)


def _streamed(streams: list[Iterator[Any]], place: list[int], device: str) -> Iterator[Any]:
    while True:
        batches = [next(stream) for stream in streams]
        if not all(isinstance(x, Tensor) for x in tree_leaves(batches)):
            raise Unfit("a batch holds what is no tensor")
        yield to_device(tree_map(lambda *xs: torch.stack([xs[i] for i in place]), *batches), device)


# -- what is alike ----------------------------------------------------------------------------------------------------


def _attributes(model: nn.Module) -> tuple[Any, ...]:
    """What the model's code can read beside parameters and buffers, as far as it is plain."""
    return tuple(
        (name, type(m).__qualname__, tuple((k, _plain(v)) for k, v in m.__dict__.items() if k not in _PLAIN))
        for name, m in model.named_modules()
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.sha256(bits).hexdigest()
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    if isinstance(value, dict):
        return tuple((str(k), _plain(v)) for k, v in value.items())
    return value if isinstance(value, (int, float, str, bool, type(None), torch.Size)) else type(value).__qualname__


def _refuse_unlike(runs: Sequence[Run]) -> None:
    """One model's code runs for all of them, so nothing but weights and statistics may differ."""
    first = _attributes(runs[0].model)
    for run in runs[1:]:
        if (other := _attributes(run.model)) != first:
            name = next((a[0] for a, b in zip(first, other) if a != b), "")
            raise Unfit(f"the models of two seeds differ in more than weights: {name or type(run.model).__name__}")
        if _closure(run.task) != _closure(runs[0].task):
            raise Unfit("the losses of two seeds differ")


def _closure(task: Task) -> Any:
    """What a loss is, and what it holds where it is a function made inside another."""
    held = tuple(_plain(cell.cell_contents) for cell in getattr(task.loss, "__closure__", None) or ())
    return getattr(task.loss, "__code__", repr(task.loss)), held
