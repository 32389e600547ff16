"""The race itself: lock, plan, tuning, finals, verdict, report."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from etude.race._asked import SEEDS, Asked
from etude.race._course import Course
from etude.race._errors import InputError
from etude.race._model import Outcome, Plan, Result, canonical
from etude.race._probe import first_runs, probe_all
from etude.race.bundle import keep, written
from etude.race.executors import open_executor
from etude.race.loggers import Log
from etude.race.plan import entries, folder_name, make_lock, make_plan, seeds_of
from etude.race.progress import Voice, clock
from etude.race.report import table
from etude.race.store import FILE, Ledger, read_fact
from etude.race.subject import find
from etude.race.task import Factory
from etude.race.tasks import refuse_while_importing
from etude.race.verdict import judge


def race(
    task: str | Factory, contenders: Sequence[str], *, folder: str | Path = "runs", quiet: bool = False, **options: Any
) -> Result:
    """Race ``contenders`` on ``task`` and say which of them helps, at an equal tuning budget, on fresh paired seeds.

    ``task``: a built-in name, ``"path/to/my_task.py[:factory]"``, or a factory that stands in a file. ``contenders``:
    recipes, e.g. ``["adamw", "muon", "adamw + dyt"]``; the first is the ``baseline`` unless another is named.
    ``folder``: where the race gets a folder of its own, or a race's own folder, to go on with it. The same call again
    resumes or extends it. ``options``: the fields of `Asked`: baseline, seeds, steps, workers, device, seed, …
    """
    result = run(ask(task, contenders, **options), folder=folder, quiet=quiet)
    if not quiet:
        show(result)
    return result


def ask(task: Any, contenders: Any, **options: Any) -> Asked:
    """What is asked, checked as far as it can be without the task."""
    refuse_while_importing()
    if not isinstance(contenders, (list, tuple)) or not all(isinstance(text, str) for text in contenders):
        raise InputError(f'contenders are a list of recipes, e.g. ["adamw", "muon"]; this is {contenders!r}')
    given = {k: v for k, v in options.items() if v is not None}
    asked = Asked.of({"task": find(task).ref, "contenders": tuple(contenders), **given})
    asked.check()
    return asked


def show(result: Result) -> None:
    """Print the table, and where the report is and how to go on."""
    console = Console()
    console.print(table(result))
    again = f"resume or extend: etude race --continue {shlex.quote(str(result.folder))}"
    console.print(f"report: {result.report}   {again}", markup=False, highlight=False, soft_wrap=True)


def resume(folder: str | Path, *, quiet: bool = False, **changes: Any) -> Result:
    """Go on with the race in ``folder`` as it was asked, but for ``changes``."""
    held = read_fact(Path(folder), "asked")
    if held is None:
        raise InputError(f"{Path(folder) / FILE} does not say what was raced; name the task and the contenders")
    asked = ask(**{**held, **{k: v for k, v in changes.items() if v is not None}})
    return run(asked, folder=folder, quiet=quiet)


def run(asked: Asked, *, folder: str | Path = "runs", quiet: bool = False) -> Result:
    """The race without the table; what it says while it runs goes to stderr."""
    subject = find(asked.task)
    lines = entries(subject, asked.contenders, asked.baseline)
    opened = subject.open(seeds_of("tune", asked.seed, 1)[0])
    if asked.steps and not opened.steps:
        raise InputError("the steps of a command are its own: write them into the command, without --steps")
    asked = replace(asked, steps=asked.steps or opened.steps or None, seeds=asked.seeds or SEEDS)
    assert asked.seeds is not None
    steps, seed, device = asked.steps or 0, asked.seed, asked.device
    wanted = asked.workers or opened.workers
    executor, workers = open_executor(asked.on, asked.task, steps=steps, device=device, workers=wanted)
    lock = make_lock(subject, opened, steps=steps, seed=seed, device=device)
    folder = Path(folder)
    folder = folder if (folder / FILE).exists() else folder / folder_name(lock)
    with ExitStack() as stack:
        voice = stack.enter_context(Voice(quiet=quiet))
        stack.enter_context(executor)
        ledger = stack.enter_context(Ledger(folder, lock)) if (folder / FILE).exists() else None
        known = (ledger.fact("probes") if ledger else None) or {}
        first: list[Outcome] = []
        if opened.probed:
            probes = probe_all(executor, voice, lines, known)
        else:
            probes, first = first_runs(executor, lines, asked.seed, known)
        ledger = ledger or stack.enter_context(Ledger(folder, lock))
        for outcome in first:
            ledger.put(outcome)
        log = Log(asked.log, folder, voice.line) if asked.log else None
        if log:
            ledger.tell(log.cell)
        ledger.set_fact("probes", probes)
        ledger.set_fact("asked", asked.plain())
        seconds = {name: probes[name]["seconds"] for name in lines}
        plan = make_plan(subject, opened, lines, asked, seconds=seconds, workers=workers)
        memory = workers * max(probes[name]["bytes"] for name in lines)
        _announce(voice, plan, memory=memory, held=len(ledger) - len(first), folder=folder)
        try:
            outcomes = Course(plan, ledger, executor, voice).run()
        except KeyboardInterrupt:
            voice.line("stopped", f"{len(ledger)} finished runs are kept in {folder}; the same command resumes")
            raise
        looks, mark = _look(ledger, lines, asked.seeds)
        keep(ledger, mark, plan, looks)
    standings, aa = judge(plan, outcomes)
    result = written(Result(plan, standings, aa, outcomes, lock, folder, looks, folder / f"report{mark}.html"))
    if log:
        log.verdict(result)
    return result


def _look(ledger: Ledger, lines: Mapping[str, float], seeds: int) -> tuple[tuple[int, ...], str]:
    """At how many other seeds these very contenders were judged before, and what marks their report among others'."""
    baseline, *others = lines.items()
    key = hashlib.sha256(canonical([baseline, *sorted(others)]).encode()).hexdigest()[:8]
    judged = ledger.fact("judged") or {"first": key}  # the first race of a folder has the plain report.html
    looks = judged.get(key, [])
    ledger.set_fact("judged", {**judged, key: sorted({*looks, seeds})})
    return tuple(n for n in looks if n != seeds), "" if judged["first"] == key else f"-{key}"


def _announce(voice: Voice, plan: Plan, *, memory: int, held: int, folder: Path) -> None:
    """The plan, before the first run: how many runs, how long, how much memory, which effects it can see."""
    contenders, final, control = len(plan.contenders), len(plan.final_seeds), len(plan.aa_seeds)
    tuning = {name: plan.tune_budget * (len(grid) > 1) for name, grid in plan.grids.items()}
    runs = sum(tuning.values()) + final * contenders + control
    work = math.fsum((tuning[name] + final) * cost for name, cost in plan.seconds_per_run.items())
    work += plan.seconds_per_run[plan.baseline] * control
    said = [
        f"{plan.task}: {contenders} contenders × (up to {max(tuning.values())} tuning + {final} final)"
        f" + {control} A/A = up to {runs} runs",
        *[f"{plan.steps} steps each"] * (plan.steps > 0),
        f"about {clock(work / plan.workers)} on {plan.workers} worker{'s' * (plan.workers > 1)}",
        *[f"{memory / 2**30:.1f} GB"] * (memory > 0),
        f"sees differences ≥ {plan.visible:.2g} sd of a seed (80 % power)",
    ]
    voice.line("plan", " · ".join(said))
    wide = max(map(len, plan.contenders))
    for name, lrs in plan.grids.items():
        middle = lrs[len(lrs) // 2]
        cost = f"{plan.seconds_per_run[name]:.2g} s a run"
        rates = f"lr {lrs[0]:.2g} … {middle:.2g} … {lrs[-1]:.2g}, wider if need be" if middle else "nothing to tune"
        voice.line("", f"{name:<{wide}}  {rates} · {cost}")
    if held:
        voice.line("resume", f"{held} finished runs in {folder}")
