"""The race itself: lock, plan, tuning, finals, verdict, report."""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from etude.race._asked import LOOKS, SEEDS, Asked
from etude.race._barnacles import apart, pieces, winner
from etude.race._budget import SPARE, Choice, fit, work
from etude.race._course import Course
from etude.race._errors import InputError
from etude.race._model import Opened, Outcome, Plan, Result, canonical
from etude.race._probe import choose_engines, first_runs, probe_all
from etude.race.bundle import keep, written
from etude.race.executors import Executor, open_executor
from etude.race.loggers import Log
from etude.race.looks import ended, split
from etude.race.plan import cost, entries, folder_name, make_lock, make_plan, seeds_of, tuned_ranges
from etude.race.progress import Voice, clock
from etude.race.report import table
from etude.race.store import FILE, Ledger, read_fact
from etude.race.subject import Subject, TaskSubject, find
from etude.race.task import Factory
from etude.race.tasks import OPTIONS, refuse_while_importing
from etude.race.verdict import judge


def race(
    task: str | Factory, contenders: Sequence[str], *, folder: str | Path = "runs", quiet: bool = False, **options: Any
) -> Result:
    """Race ``contenders`` on ``task`` and say which of them helps, at an equal tuning budget, on fresh paired seeds.

    ``task``: a built-in name, ``"path/to/my_task.py[:factory]"``, or a factory that stands in a file. ``contenders``:
    recipes, e.g. ``["adamw", "muon", "adamw + dyt"]``; the first is the ``baseline`` unless another is named.
    ``folder``: where the race gets a folder of its own, or a race's own folder, to go on with it. The same call again
    resumes or extends it. ``options``: the fields of `Asked`: baseline, seeds, steps, workers, device, seed, …; and
    what makes a task of parts or starts its runs from stored weights: data, target, checkpoint.
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
    parts = {k: str(given.pop(k)) for k in OPTIONS if k in given}  # they ride in the task's reference
    asked = Asked.of({"task": find(task, **parts).ref, "contenders": tuple(contenders), **given})
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
    result = _run(asked, Path(folder), quiet=quiet)
    stack = winner(result) if asked.barnacles else None
    if stack is None:
        return result
    assert result.folder is not None
    taken = apart(asked, stack, result)
    if not taken.contenders[1:]:
        return result
    other = _run(taken, result.folder, quiet=quiet, inner=True)
    return written(replace(result, pieces=pieces(stack, result.plan.baseline, other)))


def _run(asked: Asked, folder: Path, *, quiet: bool, inner: bool = False) -> Result:
    """``inner``: a race that another one asks for; the folder goes on to be the other's."""
    began = time.monotonic()
    subject = find(asked.task)
    lines = entries(subject, asked.contenders, asked.baseline)
    if asked.searched[0] != "grid":
        tuned_ranges(subject, lines, asked.tune)  # refuses what cannot be tuned before anything is started
    opened = subject.open(seeds_of("tune", asked.seed, 1)[0])
    if asked.steps and not opened.steps:
        raise InputError("the steps of a command are its own: write them into the command, without --steps")
    folder, asked = _fitting_steps(asked, subject, opened, lines, folder, quiet=quiet)
    asked = replace(asked, steps=asked.steps or opened.steps or None)
    steps, seed, device = asked.steps or 0, asked.seed, asked.device
    wanted = asked.workers or opened.workers
    executor, workers = open_executor(asked.on, asked.task, steps=steps, device=device, workers=wanted)
    lock = make_lock(subject, opened, steps=steps, seed=seed, device=device)
    folder = folder if (folder / FILE).exists() or asked.shorten else folder / folder_name(lock)
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
        bought = (ledger.fact("budgets") if ledger else None) or {}
        plain = replace(asked, seeds=asked.seeds or (LOOKS[-1] if asked.looks else SEEDS))
        if asked.budget or asked.gpu_hours:
            costs = {name: cost(probes[name]) for name in lines}
            choice = _choice(asked, costs, bought, steps=steps, workers=workers, spent=time.monotonic() - began)
            plain = replace(asked, seeds=choice.seeds, trials=choice.trials, looks=choice.looks)
        ledger = ledger or stack.enter_context(Ledger(folder, lock))
        for outcome in first:
            ledger.put(outcome)
        log = Log(asked.log, folder, voice.line) if asked.log else None
        if log:
            ledger.tell(log.cell)
        ledger.set_fact("probes", {**(ledger.fact("probes") or {}), **probes})
        if bought:
            ledger.set_fact("budgets", bought)
        if not inner:
            ledger.set_fact("asked", (asked if asked.budget or asked.gpu_hours else plain).plain())
        plan = make_plan(subject, opened, lines, plain, probes=probes, workers=workers)
        plan, engines = _on_engines(plan, lines, subject, executor, voice, ledger, asked.engine)
        memory = workers * max(probes[name]["bytes"] for name in lines)
        _announce(voice, plan, memory=memory, held=len(ledger) - len(first), folder=folder)
        try:
            outcomes = Course(plan, ledger, executor, voice, engines).run()
        except KeyboardInterrupt:
            voice.line("stopped", f"{len(ledger)} finished runs are kept in {folder}; the same command resumes")
            raise
        planned = plan
        plan = ended(planned, outcomes)
        looks, mark = _look(ledger, lines, plan, planned.looks)
        keep(ledger, mark, planned, looks)
    standings, aa = judge(plan, outcomes)
    result = written(Result(plan, standings, aa, outcomes, lock, folder, looks, folder / f"report{mark}.html"))
    if log:
        log.verdict(result)
    return result


def _choice(
    asked: Asked, costs: Mapping[str, float], bought: dict[str, Any], *, steps: int, workers: int, spent: float
) -> Choice:
    """What the budget buys of these contenders. Decided once for what was asked: ``bought`` remembers."""
    bill = canonical([asked.budget, asked.gpu_hours, asked.seeds, asked.trials, asked.looks, list(costs)])
    if bill not in bought:
        bought[bill] = asdict(fit(asked, costs, steps=steps, workers=workers, spent=spent))
    return Choice(**bought[bill])


def _on_engines(
    plan: Plan, lines: Mapping[str, float], subject: Subject, executor: Executor, voice: Voice, ledger: Ledger,
    engine: str,
) -> tuple[Plan, dict[str, Any]]:  # fmt: skip
    """Which engine trains each contender, kept in the ledger, and the plan by the seconds that they take."""
    engines: dict[str, Any] = ledger.fact("engines") or {}
    if not isinstance(subject, TaskSubject):
        return plan, engines
    runs = {name: plan.tune_budget + len(plan.final_seeds) for name in lines}
    runs[plan.baseline] += len(plan.aa_seeds)
    engines = choose_engines(
        executor, voice, lines, engines, engine=engine, runs=runs, seconds=plan.seconds_per_run,
        cells=len(plan.final_seeds), workers=plan.workers,
    )  # fmt: skip
    ledger.set_fact("engines", engines)
    took = {name: engines[name]["seconds"] or s for name, s in plan.seconds_per_run.items()}
    return replace(plan, seconds_per_run=took), engines


def _fitting_steps(
    asked: Asked, subject: Subject, opened: Opened, lines: Mapping[str, float], folder: Path, *, quiet: bool
) -> tuple[Path, Asked]:
    """Where the race may be shortened: its folder, named by the budget, and the steps that fit. Decided once."""
    if not asked.shorten or asked.steps is not None:
        return folder, asked
    lock = make_lock(subject, opened, steps=opened.steps, seed=asked.seed, device=asked.device)
    folder = folder / f"{folder_name(lock)}-{asked.budget or f'{asked.gpu_hours:g}gpuh'}"
    if (folder / FILE).exists() and (held := read_fact(folder, "asked")) is not None:
        return folder, replace(asked, steps=held["steps"])
    began = time.monotonic()
    executor, workers = open_executor(
        asked.on, asked.task, steps=opened.steps, device=asked.device, workers=asked.workers
    )
    with Voice(quiet=quiet) as voice, executor:
        probes = probe_all(executor, voice, lines, {})
    costs, spent = {name: cost(probes[name]) for name in lines}, time.monotonic() - began
    choice = fit(asked, costs, steps=opened.steps, workers=workers, spent=2 * spent, spare=SPARE)
    return folder, replace(asked, steps=choice.steps)


def _look(
    ledger: Ledger, lines: Mapping[str, float], plan: Plan, planned: Sequence[int]
) -> tuple[tuple[int, ...], str]:
    """At how many other seeds these very contenders were judged before, and what marks their report among others'.

    Looks that were planned are no second judgement: their error rate is split (R8).
    """
    seeds = len(plan.final_seeds)
    baseline, *others = lines.items()
    key = hashlib.sha256(canonical([baseline, *sorted(others)]).encode()).hexdigest()[:8]
    judged = ledger.fact("judged") or {"first": key}  # the first race of a folder has the plain report.html
    looks = judged.get(key, [])
    ledger.set_fact("judged", {**judged, key: sorted({*looks, seeds})})
    return tuple(n for n in looks if n != seeds and n not in planned), "" if judged["first"] == key else f"-{key}"


def _announce(voice: Voice, plan: Plan, *, memory: int, held: int, folder: Path) -> None:
    """The plan, before the first run: how many runs, how long, how much memory, which effects it can see."""
    contenders, final, control = len(plan.contenders), len(plan.final_seeds), len(plan.aa_seeds)
    tuned = {name: plan.tune_budget * (name in plan.ranges or len(lrs) > 1) for name, lrs in plan.grids.items()}
    runs = sum(tuned.values()) + final * contenders + control
    busy = work(plan.seconds_per_run, max(tuned.values()), final)
    said = [
        f"{plan.task}: {contenders} contenders × (up to {max(tuned.values())} tuning + {final} final)"
        f" + {control} A/A = up to {runs} runs",
        *[f"{plan.steps} steps each"] * (plan.steps > 0),
        f"about {clock(busy / plan.workers)} on {plan.workers} worker{'s' * (plan.workers > 1)}",
        *[f"{memory / 2**30:.1f} GB"] * (memory > 0),
        f"sees differences ≥ {plan.visible:.2g} sd of a seed (80 % power)",
    ]
    voice.line("plan", " · ".join(said))
    if plan.looks:
        shares = zip(plan.looks, split(plan.looks, plan.alpha))
        voice.line(
            "", "ends where all are decided: " + ", ".join(f"{n} seeds at α = {share:.2g}" for n, share in shares)
        )
    wide = max(map(len, plan.contenders))
    for name in plan.contenders:
        voice.line("", f"{name:<{wide}}  {_tuned(plan, name)} · {plan.seconds_per_run[name]:.2g} s a run")
    if held:
        voice.line("resume", f"{held} finished runs in {folder}")


def _tuned(plan: Plan, name: str) -> str:
    """Where a contender is tuned."""
    if name in plan.ranges:
        said = (f"{r.knob} {r.low:.2g} … {r.start:.2g} … {r.high:.2g}" for r in plan.ranges[name])
        return f"{', '.join(said)} by {plan.search}"
    lrs = plan.grids[name]
    if len(lrs) < 2:
        return "nothing to tune"
    return f"lr {lrs[0]:.2g} … {lrs[len(lrs) // 2]:.2g} … {lrs[-1]:.2g}, wider if need be"
