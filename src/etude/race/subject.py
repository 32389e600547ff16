"""What is raced on, behind one interface: a task that etude trains, or a command that trains by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from etude import recipes
from etude.race import _engines, loop, population
from etude.race._errors import InputError, one_line
from etude.race._model import Cell, Opened, Outcome
from etude.race.command import SCHEME, Command
from etude.race.task import Task, digest_state
from etude.race.tasks import Found, find_task


class Subject(Protocol):
    """Something whose cells can be trained. ``ref`` finds it from another process, see `find`."""

    @property
    def name(self) -> str: ...

    @property
    def ref(self) -> str: ...

    def entry(self, asked: str) -> tuple[str, float]:
        """A contender's canonical text without its learning rate, and the learning rate its grid is centred on."""

    def knobs(self, contender: str) -> Mapping[str, Any]:
        """What could be tuned of a contender beside lr, by name, with the values it starts from."""

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

    def knobs(self, contender: str) -> Mapping[str, Any]:
        rule = next(part for part in recipes.parse(contender).parts if part.room == "rules")
        return {**rule.method.knobs, **dict(rule.knobs)}

    def open(self, seed: int) -> Opened:
        task = open_task(self.found, seed)
        lock = {"source": self.found.source, "data": task.data_hash(), "model": digest_state(task.model)}
        lock |= {"checkpoint": self.found.checkpoint} if self.found.checkpoint else {}
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


def find(ref: Any, **options: Any) -> Subject:
    """The subject of a reference: a task, its ``options`` as in `find_task`, or a command."""
    if isinstance(ref, str) and ref.startswith(SCHEME):
        return Command.of(ref)
    return TaskSubject(find_task(ref, **options))


def open_task(found: Found, seed: int) -> Task:
    """The task at the first tuning seed; its data must not change with the seed (R1), its models share no weights."""
    try:
        one, again, other = (loop.make_task(found.factory, s) for s in (seed, seed, seed + 1))
        fed, built = one.data_hash(), digest_state(one.model)
        repeated, same = again.data_hash() == fed, other.data_hash() == fed
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"task {found.name} does not build: {type(error).__name__}: {one_line(error)}") from error
    if _weights(one) & _weights(again) or _weights(one) & _weights(other):  # a run would train on the last one's
        raise InputError(
            f"task {found.name}: the factory returns the same model twice; build it, or copy.deepcopy it, inside the "
            "factory"
        )
    if digest_state(again.model) != built:
        raise InputError(
            f"task {found.name}: the same seed gives other weights; draw them with torch after "
            "torch.manual_seed(seed), or seed what draws them"
        )
    if not repeated:
        raise InputError(
            f"task {found.name}: the same seed gives other data; nothing but the generator may shuffle them"
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
