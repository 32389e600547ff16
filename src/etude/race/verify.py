"""Is it so? Finished cells of a race run again here, and two races side by side."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.race._asked import Asked
from etude.race._errors import InputError
from etude.race._model import Outcome, Result, Standing
from etude.race.bundle import read, result_file
from etude.race.executors import open_executor
from etude.race.plan import make_lock, seeds_of
from etude.race.pool import cell_request, cores, outcome_of
from etude.race.report import to_json
from etude.race.store import Ledger, difference
from etude.race.subject import find
from etude.race.verdict import value_of


@dataclass(frozen=True)
class Again:
    """A cell run again. ``exact``: whether it must give the very same number. ``noise``: sd of a seed, stored."""

    stored: Outcome
    now: Outcome
    exact: bool
    noise: float | None

    @property
    def difference(self) -> float | None:
        """Now − stored; None where one of them failed."""
        then, now = value_of(self.stored), value_of(self.now)
        return None if then is None or now is None else now - then

    @property
    def holds(self) -> bool:
        """The same number; where it need not be the same, one within the noise of a seed; or failed both times."""
        if self.difference is None:
            return value_of(self.stored) is None and value_of(self.now) is None
        return not self.difference or (not self.exact and abs(self.difference) <= (self.noise or 0.0))


@dataclass(frozen=True)
class Verified:
    """``changed``: how the lock of this environment differs, "" where it does not. ``follows``: whether the stored
    verdicts are those of the ledger, None where there are none."""

    result: Result
    changed: str
    follows: bool | None
    cells: tuple[Again, ...]

    @property
    def holds(self) -> bool:
        """Nothing found that speaks against the race."""
        return self.follows is not False and all(cell.holds for cell in self.cells)


def verify(run: str | Path, *, cells: int = 3, seed: int | None = None, task: str | None = None) -> Verified:
    """Run ``cells`` finished cells of a race again in this environment and compare their metrics.

    Which cells is drawn at random, by ``seed`` if given. Under the same lock the plain loop must give the same number,
    bit for bit. Elsewhere, and where cells were trained together or by a command, the difference is stated and must lie
    within the standard deviation of a seed. ``task``: where the task is to be found now, if not where it was.
    """
    result = read(run)
    if not 1 <= cells <= len(result.outcomes):
        raise InputError(f"cells={cells}: the race has {len(result.outcomes)} finished runs; rerun 1 or more of them")
    assert result.folder is not None
    with Ledger(result.folder, result.lock) as ledger:
        asked, engines = Asked.of(ledger.fact("asked")), ledger.fact("engines") or {}
    subject = find(task or asked.task)
    opened = subject.open(seeds_of("tune", asked.seed, 1)[0])
    steps = int(result.lock["steps"])
    lock = make_lock(subject, opened, steps=steps, seed=asked.seed, device=asked.device)
    changed = difference(result.lock, json.loads(json.dumps(lock)))
    drawn = draw(result, cells, seed)
    executor, _ = open_executor(
        "here", task or asked.task, steps=steps, device=asked.device,
        workers=min(cells, cores()) if asked.device == "cpu" else None,
    )  # fmt: skip
    found: dict[Any, Outcome] = {}
    with executor:
        for outcome in drawn:
            executor.submit(cell_request(outcome.cell))
        for request, answer in executor.results():
            now = outcome_of(request, answer)
            found[now.cell] = now
    plain = {name for name, how in engines.items() if how.get("engine", "loop") != "loop"}
    again = tuple(
        Again(o, found[o.cell], not changed and opened.probed and o.cell.contender not in plain, _noise(result, o))
        for o in drawn
    )
    return Verified(result, changed, _follows(result), again)


def draw(result: Result, cells: int, seed: int | None) -> list[Outcome]:
    """So many finished runs at random, whatever their stage and their outcome."""
    return random.Random(seed).sample(result.outcomes, cells)


def _noise(result: Result, outcome: Outcome) -> float | None:
    """The standard deviation over seeds of the contender's final runs."""
    standing = next(s for s in result.standings if s.contender == outcome.cell.contender)
    known = [v for v in standing.values if v is not None]
    return statistics.stdev(known) if len(known) > 1 else None


def _follows(result: Result) -> bool | None:
    """Whether the stored standings are what the ledger's runs give."""
    try:
        held = json.loads(result_file(result).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return False
    now = to_json(result)
    return all(held.get(part) == now[part] for part in ("standings", "aa", "plan"))


@dataclass(frozen=True)
class Pair:
    """A contender in two races; None where it did not take part."""

    contender: str
    a: Standing | None
    b: Standing | None

    @property
    def word(self) -> str:
        """Whether the two verdicts agree."""
        decided, sides = {"better", "worse", "equivalent"}, (self.a, self.b)
        words = {s.word for s in sides if s is not None}
        if None in sides or "baseline" in words:
            return ""
        if len(words) == 1:
            return "agree"
        return "contradict each other" if words <= decided else "decided in one" if words & decided else "undecided"


@dataclass(frozen=True)
class Compared:
    """``differences``: (what, in A, in B) of the locks and of what was planned."""

    a: Result
    b: Result
    differences: tuple[tuple[str, str, str], ...]
    pairs: tuple[Pair, ...]


def compare(a: str | Path, b: str | Path) -> Compared:
    """Two finished races side by side: what of their locks and plans differs, and every contender's verdicts."""
    one, two = read(a), read(b)
    names = dict.fromkeys([*one.plan.contenders, *two.plan.contenders])
    sides = [{s.contender: s for s in result.standings} for result in (one, two)]
    left, right = (_flat({**result.lock, **_planned(result)}) for result in (one, two))
    differences = tuple(
        (name, left.get(name, "–"), right.get(name, "–"))
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    )
    return Compared(one, two, differences, tuple(Pair(n, sides[0].get(n), sides[1].get(n)) for n in names))


def _planned(result: Result) -> dict[str, Any]:
    """What of a plan bears on its verdicts, beside the lock."""
    plan = result.plan
    return {
        "baseline": plan.baseline, "contenders": len(plan.contenders), "final seeds": len(plan.final_seeds),
        "tuning runs": plan.tune_budget, "alpha": plan.alpha, "rope": plan.rope, "paired": plan.paired,
    }  # fmt: skip


def _flat(held: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    out: dict[str, str] = {}
    for name, value in held.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": str(value)}
    return out
