"""What is raced on, behind one interface: a task that etude trains (and, beside it, a command that trains itself)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from etude import recipes
from etude.race import _engines, loop, population
from etude.race._errors import InputError, one_line
from etude.race._model import Cell, Outcome
from etude.race.task import Task, digest_state
from etude.race.tasks import Found, find_task


@dataclass(frozen=True)
class Opened:
    """What a subject says of itself before anything is trained. ``lock``: what of it decides a result."""

    steps: int
    metric: str
    minimize: bool
    lock: dict[str, Any]


class Subject(Protocol):
    """Something whose cells can be trained. ``ref`` finds it from another process, see `find`."""

    @property
    def name(self) -> str: ...

    @property
    def ref(self) -> str: ...

    def entry(self, asked: str) -> tuple[str, float]:
        """A contender's canonical text without its learning rate, and the learning rate its grid is centred on."""

    def open(self, seed: int) -> Opened:
        """What it is, seen at one seed; refuses what cannot be raced."""

    def train(self, cell: Cell, *, steps: int, device: str) -> Outcome:
        """One run, to the end. Whatever goes wrong is an outcome with its reason."""

    def probe(self, contender: str, *, lr: float, steps: int, device: str, whole: bool) -> dict[str, Any]:
        """What a few steps change and cost, see `loop.probe`."""


@dataclass(frozen=True)
class TaskSubject:
    """A task's factory: etude trains it."""

    found: Found

    @property
    def name(self) -> str:
        return self.found.name

    @property
    def ref(self) -> str:
        return self.found.ref

    def entry(self, asked: str) -> tuple[str, float]:
        try:
            recipe = recipes.parse(asked)
        except (ValueError, TypeError) as error:
            raise InputError(one_line(error)) from error
        rule = next((part for part in recipe.parts if part.room == "rules"), None)
        if rule is None:
            raise InputError(f"the contender {asked!r} names no rule; add one, e.g. 'adamw + {recipe}'")
        if "lr" not in rule.method.knobs:
            raise InputError(f"the contender {asked!r} has no lr to tune")
        default = rule.method.knobs["lr"]
        centre = dict(rule.knobs).get("lr", default)
        if not isinstance(centre, (int, float)) or not 0 < centre < 1000:
            raise InputError(f"the contender {asked!r}: its lr, {centre}, cannot centre a grid; give one in (0, 1000)")
        return str(recipe.with_knobs(lr=default)), float(centre)

    def open(self, seed: int) -> Opened:
        task = open_task(self.found, seed)
        lock = {"source": self.found.source, "data": task.data_hash(), "model": digest_state(task.model)}
        name = f"{'test' if task.test is not None else 'validation'} {task.name}"
        return Opened(task.steps, name, task.minimize, lock)

    def train(self, cell: Cell, *, steps: int, device: str) -> Outcome:
        return loop.train(self.found.factory, cell, steps=steps, device=device)

    def probe(self, contender: str, *, lr: float, steps: int, device: str, whole: bool) -> dict[str, Any]:
        return loop.probe(self.found.factory, contender, lr=lr, steps=steps, device=device, whole=whole)

    def train_cells(
        self, cells: Sequence[Cell], how: Mapping[str, Any], *, steps: int, device: str
    ) -> tuple[list[Outcome], str]:
        """Cells of one contender together, see `population.train_cells`."""
        return population.train_cells(self.found.factory, cells, population.How(**how), steps=steps, device=device)

    def choose(self, contender: str, **asked: Any) -> dict[str, Any]:
        """How the contender's cells are to be trained, see `_engines.choose`."""
        return asdict(_engines.choose(self.found.factory, contender, **asked))


def find(ref: Any) -> Subject:
    """The subject of a reference: a built-in task, a file's factory, or a factory."""
    return TaskSubject(find_task(ref))


def open_task(found: Found, seed: int) -> Task:
    """The task at the first tuning seed; its data must not change with the seed (R1), its models share no weights."""
    try:
        one, again, other = (loop.make_task(found.factory, s) for s in (seed, seed, seed + 1))
        same = one.data_hash() == other.data_hash()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"task {found.name} does not build: {type(error).__name__}: {one_line(error)}") from error
    if _weights(one) & _weights(again) or _weights(one) & _weights(other):  # a run would train on the last one's
        raise InputError(
            f"task {found.name}: the factory returns the same model twice; build it, or copy.deepcopy it, inside the "
            "factory"
        )
    if not same:
        raise InputError(
            f"task {found.name}: the data change with the seed; fix their seed, only the weights may differ"
        )
    return one


def _weights(task: Task) -> set[int]:
    """Where the parameters lie in memory."""
    return {p.untyped_storage().data_ptr() for p in task.model.parameters() if p.numel()}


def device_name(device: str) -> str:
    """What decides rounding: the kind of machine and its instructions."""
    return torch.cuda.get_device_name(device) if device != "cpu" else torch.backends.cpu.get_cpu_capability()
