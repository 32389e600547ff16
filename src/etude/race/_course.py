"""The course of a race: which cells run next, and every outcome into the ledger before it is looked at."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator

from etude.race._model import Cell, Outcome, Plan
from etude.race.executors import Executor
from etude.race.looks import decided, stages
from etude.race.pool import cell_request, outcome_of
from etude.race.progress import Voice
from etude.race.search import search_of
from etude.race.store import Ledger


class Course:
    """The cells of a plan, stage by stage, each stage's cells interleaved over the contenders (R7)."""

    def __init__(self, plan: Plan, ledger: Ledger, pool: Executor, voice: Voice) -> None:
        self.plan, self.ledger, self.pool, self.voice = plan, ledger, pool, voice
        self.left = {name: plan.tune_budget + len(plan.final_seeds) for name in plan.contenders}  # runs
        self.left[plan.baseline] += len(plan.aa_seeds)
        self.spent, self.rate, self.began = 0.0, float(plan.workers), time.monotonic()

    def run(self) -> tuple[Outcome, ...]:
        """Every outcome of the plan, in the plan's order, whatever the order in which they finished."""
        plan = self.plan
        tuned = self._tune()
        best = {name: search_of(plan, name).choose(tuned[name]) for name in plan.contenders}

        def cells(name: str, stage: str, seeds: Iterable[int]) -> list[Cell]:
            return [Cell(name, stage, best[name].lr, seed, best[name].more) for seed in seeds]

        outcomes = tuple(o for name in plan.contenders for o in tuned[name])
        for stage in stages(plan):
            finals = [cells(name, "final", stage.final_seeds) for name in plan.contenders]
            controls = cells(plan.baseline, "aa", stage.aa_seeds)
            ran = self._finish(_interleaved([*finals, controls]))
            if plan.looks and decided(stage, [*outcomes, *ran]):
                break
        return (*outcomes, *ran)

    def _tune(self) -> dict[str, list[Outcome]]:
        """The tuning runs. A contender's next trials depend on its own finished runs alone: a resumed race agrees."""
        plan = self.plan
        known: dict[str, list[Outcome]] = {name: [] for name in plan.contenders}
        out = dict.fromkeys(plan.contenders, 0)
        total = plan.tune_budget * len(plan.contenders)

        def ask(name: str) -> list[Cell]:
            """Which cells to run next; what the ledger holds counts as run."""
            nonlocal total
            todo: list[Cell] = []
            while not todo:
                trials = search_of(plan, name).ask(known[name])
                if not trials:
                    spared = plan.tune_budget - len(known[name])
                    self.left[name] -= spared
                    total -= spared
                    break
                cells = [Cell(name, "tune", lr, plan.tune_seeds[i], more) for (lr, more), i in trials]
                held = [outcome for cell in cells if (outcome := self.ledger.get(cell)) is not None]
                todo = [cell for cell in cells if self.ledger.get(cell) is None]
                known[name] += held
                self.left[name] -= len(held)
            out[name] = len(todo)
            return todo

        self._submit(_interleaved([ask(name) for name in plan.contenders]))
        for outcome in self._results():
            name = outcome.cell.contender
            known[name].append(outcome)
            out[name] -= 1
            if not out[name]:
                self._submit(ask(name))
            self.voice.stage("tuning", sum(map(len, known.values())), total, self._seconds_left())
        return known

    def _finish(self, cells: list[Cell]) -> list[Outcome]:
        """The outcomes of the final cells and of the A/A control, in the order of ``cells``."""
        todo = [cell for cell in cells if self.ledger.get(cell) is None]
        done = len(cells) - len(todo)
        self._submit(todo)
        for _ in self._results():
            done += 1
            self.voice.stage("final", done, len(cells), self._seconds_left())
        return [outcome for cell in cells if (outcome := self.ledger.get(cell)) is not None]

    def _submit(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            self.pool.submit(cell_request(cell))

    def _results(self) -> Iterator[Outcome]:
        """Outcomes as they finish, each in the ledger before it is handed on."""
        for request, answer in self.pool.results():
            outcome = outcome_of(request, answer)
            self.ledger.put(outcome)
            name = outcome.cell.contender
            self.left[name] -= 1
            self.spent += self.plan.seconds_per_run[name]
            yield outcome

    def _seconds_left(self) -> float | None:
        """What is left at the rate so far; the plan's seconds only weigh the contenders against each other."""
        elapsed = time.monotonic() - self.began
        rest = math.fsum(self.plan.seconds_per_run[name] * n for name, n in self.left.items())
        return rest * elapsed / self.spent if self.spent else None


def _interleaved(lists: Iterable[Iterable[Cell]]) -> list[Cell]:
    """The first of each, the second of each, …"""
    return [cell for row in itertools.zip_longest(*lists) for cell in row if cell is not None]
