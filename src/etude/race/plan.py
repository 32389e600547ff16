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
from etude._words import nearest
from etude.race._asked import MOST, SEEDS, Asked
from etude.race._errors import InputError
from etude.race._model import Opened, Plan, Range, canonical
from etude.race.looks import looks_of, split
from etude.race.search import ranges
from etude.race.subject import Subject, device_name
from etude.race.verdict import visible_effect

GRID = 7
FACTOR = math.sqrt(10)
TUNE_SEEDS = 3
ALPHA = 0.05
_DECIDES = {
    "_checkpoint", "_stacks", "_traced", "bridges", "command", "loop", "models", "population", "subject", "task",
    "tasks",
}  # fmt: skip
"""What of the race's own code decides the result of a cell."""


def entries(subject: Subject, asked: Sequence[str], baseline: str | None) -> dict[str, float]:
    """Contender → the centre of its grid, baseline first."""
    if not isinstance(asked, (list, tuple)) or not all(isinstance(text, str) for text in asked):
        raise InputError(f'contenders are a list of recipes, e.g. ["adamw", "muon"]; this is {asked!r}')
    found: dict[str, float] = {}
    for text in [*([baseline] if baseline else []), *asked]:
        name, centre = subject.entry(text)
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


def seeds_of(stage: str, seed: int, count: int, skip: int = 0) -> tuple[int, ...]:
    """The seeds of a stage, the same however many there are: tuning, final and A/A never share one."""
    first = 10_000 * seed + MOST * ("tune", "final", "aa").index(stage)
    return tuple(range(first + skip, first + skip + count))


def grid(centre: float) -> tuple[float, ...]:
    """Seven learning rates, factor √10, around ``centre``; the one of a contender that has none to tune is 0."""
    if not centre:
        return (0.0,)
    return tuple(float(f"{centre * FACTOR**i:.6g}") for i in range(-(GRID // 2), GRID // 2 + 1))


def make_lock(subject: Subject, opened: Opened, *, steps: int, seed: int, device: str) -> dict[str, Any]:
    """Everything but the cell that decides a result; a ledger is made under one lock."""
    return {
        "task": subject.name,
        **opened.lock,
        "metric": opened.metric,
        "minimize": opened.minimize,
        "steps": steps,
        "seed": seed,
        "device": f"{device} {platform.machine()} {device_name(device)}",
        "etude": f"{importlib.metadata.version('etude')} {_source()}",
        "torch": torch.__version__,
    }


def make_plan(
    subject: Subject,
    opened: Opened,
    contenders: Mapping[str, float],
    asked: Asked,
    *,
    probes: Mapping[str, Mapping[str, Any]],
    workers: int,
) -> Plan:
    """``contenders``: canonical text → the learning rate its grid is centred on, baseline first."""
    names, seeds, (search, trials) = tuple(contenders), asked.seeds or SEEDS, asked.searched
    looks = looks_of(seeds) if asked.looks else ()
    alpha = split(looks, ALPHA)[-1] if looks else ALPHA
    return Plan(
        task=subject.name,
        metric=opened.metric,
        minimize=opened.minimize,
        steps=asked.steps or opened.steps,
        baseline=names[0],
        contenders=names,
        grids={name: grid(lr) for name, lr in contenders.items()},
        tune_budget=trials,
        tune_seeds=seeds_of("tune", asked.seed, TUNE_SEEDS),
        final_seeds=seeds_of("final", asked.seed, seeds, asked.skip),
        aa_seeds=seeds_of("aa", asked.seed, seeds, asked.skip),
        alpha=ALPHA,
        seconds_per_run={name: cost(probes[name]) for name in names},
        visible=visible_effect(seeds, len(names) - 1, alpha=alpha),
        workers=workers,
        search=search,
        ranges=tuned_ranges(subject, contenders, asked.tune) if search != "grid" else {},
        looks=looks,
        flops={name: flops for name in names if (flops := probes[name].get("flops"))},
        joules={name: joules for name in names if (joules := probes[name].get("joules"))},
    )


def tuned_ranges(
    subject: Subject, contenders: Mapping[str, float], tune: Sequence[str]
) -> dict[str, tuple[Range, ...]]:
    """What is tuned of each contender, lr first; a knob that none of them has is refused."""
    known = {name: subject.knobs(name) for name in contenders}
    for knob in tune:
        if knob != "lr" and not any(knob in held for held in known.values()):
            near = nearest(knob, {k for held in known.values() for k in held})
            raise InputError(f"no contender has a knob {knob!r} to tune; nearest: {near}")
    return {name: ranges(name, lr, known[name], tune) for name, lr in contenders.items()}


def cost(probe: Mapping[str, Any]) -> float:
    """Seconds of one run by the clock on the wall, as far as a probe tells."""
    return float(probe.get("wall") or probe["seconds"])


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
            part[0] == "race" and part[1].removesuffix(".py") not in _DECIDES
        ):
            continue
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
