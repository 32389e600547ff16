"""The course of a race: which cells run next, and every outcome into the ledger before it is looked at."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from etude.race._engines import FEWEST
from etude.race._model import Cell, Outcome, Plan
from etude.race.executors import Executor
from etude.race.looks import decided, stages
from etude.race.pool import cell_request, outcome_of
from etude.race.progress import Voice
from etude.race.search import search_of
from etude.race.store import Ledger, decoded

T = TypeVar("T")


class Course:
    """The cells of a plan, stage by stage, each stage's cells interleaved over the contenders (R7)."""

    def __init__(
        self, plan: Plan, ledger: Ledger, pool: Executor, voice: Voice, engines: Mapping[str, Any] | None = None
    ) -> None:
        self.plan, self.ledger, self.pool, self.voice = plan, ledger, pool, voice
        self.engines, self.told = engines or {}, set[str]()
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
            ran = self._finish([*finals, cells(plan.baseline, "aa", stage.aa_seeds)])
            if plan.looks and decided(stage, [*outcomes, *ran]):
                break
        return (*outcomes, *ran)

    def _tune(self) -> dict[str, list[Outcome]]:
        """The tuning runs. A contender's next trials depend on its own finished runs alone: a resumed race agrees."""
        plan = self.plan
        known: dict[str, list[Outcome]] = {name: [] for name in plan.contenders}
        out = dict.fromkeys(plan.contenders, 0)
        total = plan.tune_budget * len(plan.contenders)

        def ask(name: str) -> list[list[Cell]]:
            """Which cells to run next, in chunks; what the ledger holds counts as run."""
            nonlocal total
            todo: list[Cell] = []
            cells: list[Cell] = []
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
            return self._chunks(cells) if todo else []

        self._submit(_interleaved([ask(name) for name in plan.contenders]))
        for outcome in self._results():
            name = outcome.cell.contender
            known[name].append(outcome)
            out[name] -= 1
            if not out[name]:
                self._submit(ask(name))
            self.voice.stage("tuning", sum(map(len, known.values())), total, self._seconds_left())
        return known

    def _finish(self, stages: list[list[Cell]]) -> list[Outcome]:
        """The outcomes of the final cells and of the A/A control, interleaved over ``stages``."""
        cells = _interleaved(stages)
        done = sum(self.ledger.get(cell) is not None for cell in cells)
        self._submit(_interleaved([self._chunks(stage) for stage in stages]))
        for _ in self._results():
            done += 1
            self.voice.stage("final", done, len(cells), self._seconds_left())
        return [outcome for cell in cells if (outcome := self.ledger.get(cell)) is not None]

    def _chunks(self, cells: list[Cell]) -> list[list[Cell]]:
        """Cells of one contender as they are trained together: a function of the plan alone, so that a race resumed
        gives the same bits. A chunk that the ledger holds is left out; one that it holds in part is run again."""
        how = self.engines.get(cells[0].contender, {}) if cells else {}
        chunks = [[cell] for cell in cells]
        if how.get("engine") == "population" and len(cells) >= FEWEST:
            count = math.ceil(len(cells) / how["size"])
            ends = [round(i * len(cells) / count) for i in range(count + 1)]
            chunks = [cells[a:b] for a, b in itertools.pairwise(ends)]
        return [chunk for chunk in chunks if any(self.ledger.get(cell) is None for cell in chunk)]

    def _submit(self, chunks: Iterable[list[Cell]]) -> None:
        for chunk in chunks:
            if len(chunk) < FEWEST:
                for cell in chunk:
                    self.pool.submit(cell_request(cell))
            else:
                how = self.engines[chunk[0].contender]
                self.pool.submit({"kind": "cells", "cells": [asdict(cell) for cell in chunk], "how": how})

    def _results(self) -> Iterator[Outcome]:
        """Outcomes as they finish, each in the ledger before it is handed on; what it holds already stays."""
        for request, answer in self.pool.results():
            if "cells" in request and "died" in answer:  # of memory, maybe: each alone, in the plain loop
                self._tell(request["cells"][0]["contender"], answer["died"])
                self._submit([[Cell.of(cell)] for cell in request["cells"]])
                continue
            if "outcomes" in answer:
                found = [decoded(outcome) for outcome in answer["outcomes"]]
                self._tell(found[0].cell.contender, answer["why"])
            else:
                found = [outcome_of(request, answer)]
            new = [outcome for outcome in found if self.ledger.get(outcome.cell) is None]
            self.ledger.put_all(new)
            for outcome in new:
                name = outcome.cell.contender
                self.left[name] -= 1
                self.spent += self.plan.seconds_per_run[name]
                yield outcome

    def _tell(self, name: str, why: str) -> None:
        """Once per contender: its cells were trained one by one after all."""
        if why and name not in self.told:
            self.told.add(name)
            self.voice.line("engine", f"{name}: one by one after all: {why}")

    def _seconds_left(self) -> float | None:
        """What is left at the rate so far; the plan's seconds only weigh the contenders against each other."""
        elapsed = time.monotonic() - self.began
        rest = math.fsum(self.plan.seconds_per_run[name] * n for name, n in self.left.items())
        return rest * elapsed / self.spent if self.spent else None


def _interleaved(lists: Iterable[Iterable[T]]) -> list[T]:
    """The first of each, the second of each, …"""
    return [cell for row in itertools.zip_longest(*lists) for cell in row if cell is not None]
