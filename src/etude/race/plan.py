"""What is decided before the first run: the lock, the seeds, the learning rates, and what can be seen with them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import etude
from etude import recipes
from etude.race._errors import InputError, one_line
from etude.race._model import Plan, canonical
from etude.race.loop import make_task
from etude.race.task import Task, digest_state
from etude.race.tasks import Found
from etude.race.verdict import visible_effect

GRID = 7
FACTOR = math.sqrt(10)
TUNE_SEEDS = 3
FLOOR = 6
"""Fewer final seeds cannot reach p < .05 in an exact paired test."""
MOST = 1000
"""Seeds of one stage; the stages' ranges of seeds do not meet."""
_DECIDES = {"loop", "task", "tasks"}
"""What of the race's own code decides the result of a cell."""


def entry(asked: str) -> tuple[str, float]:
    """A contender's canonical text without its learning rate, and the learning rate its grid is centred on."""
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


def entries(asked: Sequence[str], baseline: str | None) -> dict[str, float]:
    """Contender → the centre of its grid, baseline first."""
    if not isinstance(asked, (list, tuple)) or not all(isinstance(text, str) for text in asked):
        raise InputError(f'contenders are a list of recipes, e.g. ["adamw", "muon"]; this is {asked!r}')
    found: dict[str, float] = {}
    for text in [*([baseline] if baseline else []), *asked]:
        name, centre = entry(text)
        if name in found and text != baseline:
            raise InputError(
                f"{text!r} stands twice: {name} (a contender's lr is tuned, so it does not tell two apart)"
            )
        found[name] = centre
    if len(found) < 2:
        raise InputError(
            f"a race needs a baseline and at least one other contender; it got {', '.join(found) or 'none'}"
        )
    return found


def seeds_of(stage: str, seed: int, count: int) -> tuple[int, ...]:
    """The seeds of a stage, the same however many there are: tuning, final and A/A never share one."""
    first = 10_000 * seed + MOST * ("tune", "final", "aa").index(stage)
    return tuple(range(first, first + count))


def grid(centre: float) -> tuple[float, ...]:
    """Seven learning rates, factor √10, around ``centre``."""
    return tuple(float(f"{centre * FACTOR**i:.6g}") for i in range(-(GRID // 2), GRID // 2 + 1))


def open_task(found: Found, seed: int) -> Task:
    """The task at the first tuning seed; its data must not change with the seed (R1), its models share no weights."""
    try:
        one, again, other = (make_task(found.factory, s) for s in (seed, seed, seed + 1))
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


def make_lock(found: Found, task: Task, *, steps: int, seed: int, device: str) -> dict[str, Any]:
    """Everything but the cell that decides a result; a ledger is made under one lock."""
    where = torch.cuda.get_device_name(device) if device != "cpu" else torch.backends.cpu.get_cpu_capability()
    return {
        "task": found.name,
        "source": found.source,
        "data": task.data_hash(),
        "model": digest_state(task.model),
        "metric": metric_name(task),
        "minimize": task.minimize,
        "steps": steps,
        "seed": seed,
        "device": f"{device} {platform.machine()} {where}",
        "etude": f"{importlib.metadata.version('etude')} {_source()}",
        "torch": torch.__version__,
    }


def metric_name(task: Task) -> str:
    """The metric's name with the data it is taken on."""
    return f"{'test' if task.test is not None else 'validation'} {task.name}"


def make_plan(
    found: Found,
    task: Task,
    contenders: Mapping[str, float],
    *,
    steps: int,
    seed: int,
    seeds: int,
    seconds: Mapping[str, float],
    workers: int,
) -> Plan:
    """``contenders``: canonical text → the learning rate its grid is centred on, baseline first."""
    names = tuple(contenders)
    return Plan(
        task=found.name,
        metric=metric_name(task),
        minimize=task.minimize,
        steps=steps,
        baseline=names[0],
        contenders=names,
        grids={name: grid(lr) for name, lr in contenders.items()},
        tune_seeds=seeds_of("tune", seed, TUNE_SEEDS),
        final_seeds=seeds_of("final", seed, seeds),
        aa_seeds=seeds_of("aa", seed, seeds),
        seconds_per_run=dict(seconds),
        visible=visible_effect(seeds, len(names) - 1),
        workers=workers,
    )


def folder_name(lock: Mapping[str, Any]) -> str:
    """``digits-1f2e3d4c``: the task and the lock."""
    return f"{lock['task']}-{hashlib.sha256(canonical(dict(lock)).encode()).hexdigest()[:8]}"


def _source() -> str:
    """A digest of all of etude that can decide a result: the rooms and the loop, not the report or the catalogue."""
    root = Path(etude.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        part = file.relative_to(root).parts
        if part[0] in ("catalogue", "doctor", "cli.py", "_commands.py") or (
            part[0] == "race" and file.stem not in _DECIDES
        ):
            continue
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
