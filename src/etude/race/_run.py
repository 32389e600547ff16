"""The race itself: lock, plan, tuning, finals, verdict, report."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import shlex
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from etude.race._errors import InputError, RaceError, one_line
from etude.race._model import Cell, Outcome, Plan, Result, canonical
from etude.race.plan import FLOOR, MOST, entries, folder_name, make_lock, make_plan, open_task, seeds_of
from etude.race.pool import Pool, cell_request, cores, outcome_of
from etude.race.progress import Voice, clock
from etude.race.report import table, to_json, write_html
from etude.race.store import FILE, Ledger, read_fact
from etude.race.tasks import Factory, find_task, refuse_while_importing
from etude.race.verdict import choose_lr, judge, next_trials


def race(
    task: str | Factory,
    contenders: Sequence[str],
    *,
    baseline: str | None = None,
    seeds: int = 10,
    steps: int | None = None,
    workers: int | None = None,
    folder: str | Path = "runs",
    device: str = "cpu",
    seed: int = 0,
    quiet: bool = False,
) -> Result:
    """Race ``contenders`` on ``task`` and say which of them helps, at an equal tuning budget, on fresh paired seeds.

    ``task``: a built-in name, ``"path/to/my_task.py[:factory]"``, or a factory that stands in a file. ``contenders``:
    recipes, e.g. ``["adamw", "muon", "adamw + dyt"]``; the first is the ``baseline`` unless another is named.
    ``folder``: where the race gets a folder of its own, or a race's own folder, to go on with it. The same call again
    resumes or extends it.
    """
    result = run(
        task, contenders, baseline=baseline, seeds=seeds, steps=steps, workers=workers, folder=folder, device=device,
        seed=seed, quiet=quiet,
    )  # fmt: skip
    if not quiet:
        show(result)
    return result


def show(result: Result) -> None:
    """Print the table, and where the report is and how to go on."""
    console = Console()
    console.print(table(result))
    again = f"resume or extend: etude race --continue {shlex.quote(str(result.folder))}"
    console.print(f"report: {result.report}   {again}", markup=False, highlight=False, soft_wrap=True)


def resume(folder: str | Path, **changes: Any) -> Result:
    """Go on with the race in ``folder`` as it was asked, but for ``changes``."""
    asked = read_fact(Path(folder), "asked")
    if asked is None:
        raise InputError(f"{Path(folder) / FILE} does not say what was raced; name the task and the contenders")
    return run(**{**asked, **{k: v for k, v in changes.items() if v is not None}, "folder": folder})


def run(
    task: str | Factory,
    contenders: Sequence[str],
    *,
    baseline: str | None = None,
    seeds: int = 10,
    steps: int | None = None,
    workers: int | None = None,
    folder: str | Path = "runs",
    device: str = "cpu",
    seed: int = 0,
    quiet: bool = False,
) -> Result:
    """The race without the table; what it says while it runs goes to stderr."""
    refuse_while_importing()
    found = find_task(task)
    lines = entries(contenders, baseline)
    _check(seeds=seeds, steps=steps, seed=seed, device=device, workers=workers)
    workers = _workers(workers, device)
    opened = open_task(found, seeds_of("tune", seed, 1)[0])
    steps = steps or opened.steps
    lock = make_lock(found, opened, steps=steps, seed=seed, device=device)
    folder = Path(folder)
    folder = folder if (folder / FILE).exists() else folder / folder_name(lock)
    asked = {"task": found.ref, "contenders": list(contenders), "baseline": baseline, "seeds": seeds, "steps": steps}
    with ExitStack() as stack:
        voice = stack.enter_context(Voice(quiet=quiet))
        pool = stack.enter_context(Pool(found.ref, steps=steps, device=device, workers=workers))
        ledger = stack.enter_context(Ledger(folder, lock)) if (folder / FILE).exists() else None
        probes = _probe(pool, voice, lines, (ledger.fact("probes") if ledger else None) or {})
        ledger = ledger or stack.enter_context(Ledger(folder, lock))
        ledger.set_fact("probes", probes)
        ledger.set_fact("asked", {**asked, "device": device, "seed": seed})
        seconds = {name: probes[name]["seconds"] for name in lines}
        plan = make_plan(
            found, opened, lines, steps=steps, seed=seed, seeds=seeds, seconds=seconds, workers=workers
        )  # fmt: skip
        memory = workers * max(probes[name]["bytes"] for name in lines)
        _announce(voice, plan, memory=memory, held=len(ledger), folder=folder)
        try:
            outcomes = _Course(plan, ledger, pool, voice).run()
        except KeyboardInterrupt:
            voice.line("stopped", f"{len(ledger)} finished runs are kept in {folder}; the same command resumes")
            raise
        looks, mark = _look(ledger, lines, seeds)
    standings, aa = judge(plan, outcomes)
    result = Result(plan, standings, aa, outcomes, lock, folder, looks, folder / f"report{mark}.html")
    try:
        held = json.dumps(to_json(result), indent=1) + "\n"
        (folder / f"result{mark}.json").write_text(held, encoding="utf-8")
        write_html(result, folder / f"report{mark}.html")
    except OSError as error:
        raise RaceError(f"cannot write the report in {folder}: {error.strerror}; the ledger holds every run") from error
    return result


def _look(ledger: Ledger, lines: Mapping[str, float], seeds: int) -> tuple[tuple[int, ...], str]:
    """At how many other seeds these very contenders were judged before, and what marks their report among others'."""
    baseline, *others = lines.items()
    key = hashlib.sha256(canonical([baseline, *sorted(others)]).encode()).hexdigest()[:8]
    judged = ledger.fact("judged") or {"first": key}  # the first race of a folder has the plain report.html
    looks = judged.get(key, [])
    ledger.set_fact("judged", {**judged, key: sorted({*looks, seeds})})
    return tuple(n for n in looks if n != seeds), "" if judged["first"] == key else f"-{key}"


def _check(*, seeds: int, steps: int | None, seed: int, device: str, workers: int | None) -> None:
    for name, given in (("seeds", seeds), ("steps", steps), ("seed", seed), ("workers", workers)):
        if given is not None and type(given) is not int:
            raise InputError(f"{name}={given!r}: this is not a whole number")
    if not FLOOR <= seeds <= MOST:
        raise InputError(
            f"seeds={seeds}: a race takes {FLOOR} to {MOST} final seeds; fewer than {FLOOR} cannot decide anything"
        )
    if steps is not None and steps < 1:
        raise InputError(f"steps={steps}: a run takes at least one step")
    if seed < 0:
        raise InputError(f"seed={seed}: a seed is 0 or more")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {device!r} is not to be had here: {one_line(error)}") from error


def _workers(asked: int | None, device: str) -> int:
    """As many processes as there are cores, each on one thread; one on any other device."""
    have = cores()
    if asked is not None and not 1 <= asked <= have:
        raise InputError(
            f"workers={asked}: this machine gives {have} core{'s' * (have > 1)}; more workers would slow each other"
        )
    return asked or (have if device == "cpu" else 1)


def _probe(pool: Pool, voice: Voice, lines: Mapping[str, float], known: dict[str, Any]) -> dict[str, Any]:
    """What a few warm steps of each contender cost, once each has been seen to take effect (R10).

    All are probed at the baseline's lr; ``known`` holds what an earlier race in this folder has probed. What a few
    steps do not tell from the baseline may act later: both then run the whole schedule.
    """
    names, lr = list(lines), next(iter(lines.values()))
    probes = {name: held for name, held in known.items() if held["lr"] == lr}
    probes |= _probed(pool, [name for name in names if name not in probes], lr)
    base = probes[names[0]]
    if base["reason"]:
        raise InputError(f"the baseline {names[0]} does not run on this task: {base['reason']}")
    if same := [name for name in names[1:] if probes[name]["digest"] == base["digest"]]:
        voice.line("probe", f"{', '.join(same)}: as {names[0]} in the first steps; trying the whole schedule")
        whole = _probed(pool, [names[0], *same], lr, whole=True)
        for name in same:
            if (digest := whole[name]["digest"]) and digest == whole[names[0]]["digest"]:
                raise InputError(
                    f"{name} is a no-op on this model: it trains to the same weights and outputs as {names[0]}"
                )
            probes[name]["digest"] = digest  # unlike the baseline's: a race resumed need not try again
    return probes


def _probed(pool: Pool, names: Sequence[str], lr: float, whole: bool = False) -> dict[str, Any]:
    """The workers' answers to a probe of each contender; a worker that died is one that tells nothing."""
    for name in names:
        pool.submit({"kind": "probe", "contender": name, "lr": lr, "whole": whole})
    found = {}
    for request, answer in pool.results():
        if "refused" in answer:
            raise InputError(answer["refused"])
        died = {"digest": "", "reason": answer.get("died"), "seconds": 0.0, "bytes": 0}
        found[request["contender"]] = {**(died if "died" in answer else answer), "lr": lr}
    return found


def _announce(voice: Voice, plan: Plan, *, memory: int, held: int, folder: Path) -> None:
    """The plan, before the first run: how many runs, how long, how much memory, which effects it can see."""
    contenders, final, control = len(plan.contenders), len(plan.final_seeds), len(plan.aa_seeds)
    runs = (plan.tune_budget + final) * contenders + control
    work = (plan.tune_budget + final) * math.fsum(plan.seconds_per_run.values())
    work += plan.seconds_per_run[plan.baseline] * control
    said = [
        f"{plan.task}: {contenders} contenders × (up to {plan.tune_budget} tuning + {final} final)"
        f" + {control} A/A = up to {runs} runs",
        f"{plan.steps} steps each",
        f"about {clock(work / plan.workers)} on {plan.workers} worker{'s' * (plan.workers > 1)}",
        f"{memory / 2**30:.1f} GB",
        f"sees differences ≥ {plan.visible:.2g} sd of a seed (80 % power)",
    ]
    voice.line("plan", " · ".join(said))
    wide = max(map(len, plan.contenders))
    for name, lrs in plan.grids.items():
        middle = lrs[len(lrs) // 2]
        cost = f"{plan.seconds_per_run[name]:.2g} s a run"
        voice.line("", f"{name:<{wide}}  lr {lrs[0]:.2g} … {middle:.2g} … {lrs[-1]:.2g}, wider if need be · {cost}")
    if held:
        voice.line("resume", f"{held} finished runs in {folder}")


class _Course:
    """The cells of a plan, stage by stage, each stage's cells interleaved over the contenders (R7)."""

    def __init__(self, plan: Plan, ledger: Ledger, pool: Pool, voice: Voice) -> None:
        self.plan, self.ledger, self.pool, self.voice = plan, ledger, pool, voice
        self.left = {name: plan.tune_budget + len(plan.final_seeds) for name in plan.contenders}  # runs
        self.left[plan.baseline] += len(plan.aa_seeds)
        self.spent, self.rate, self.began = 0.0, float(plan.workers), time.monotonic()

    def run(self) -> tuple[Outcome, ...]:
        """Every outcome of the plan, in the plan's order, whatever the order in which they finished."""
        plan = self.plan
        tuned = self._tune()
        lrs = {name: choose_lr(tuned[name], plan.minimize)[0] for name in plan.contenders}
        finals = [[Cell(name, "final", lrs[name], seed) for seed in plan.final_seeds] for name in plan.contenders]
        controls = [Cell(plan.baseline, "aa", lrs[plan.baseline], seed) for seed in plan.aa_seeds]
        ran = self._finish(_interleaved([*finals, controls]))
        return (*(o for name in plan.contenders for o in tuned[name]), *ran)

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
                trials = next_trials(
                    plan.grids[name], known[name], plan.tune_budget, plan.tune_seeds, minimize=plan.minimize
                )
                if not trials:
                    spared = plan.tune_budget - len(known[name])
                    self.left[name] -= spared
                    total -= spared
                    break
                cells = [Cell(name, "tune", lr, plan.tune_seeds[i]) for lr, i in trials]
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
