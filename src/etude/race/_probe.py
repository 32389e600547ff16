"""Before the first run: each contender is built and takes a few steps, to see what it changes and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from etude.race._engines import SHORT
from etude.race._errors import InputError
from etude.race._model import Cell, Outcome
from etude.race.executors import Executor
from etude.race.plan import seeds_of
from etude.race.pool import cell_request, outcome_of
from etude.race.population import How
from etude.race.progress import Voice


def probe_all(pool: Executor, voice: Voice, lines: Mapping[str, float], known: dict[str, Any]) -> dict[str, Any]:
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
    _refuse_twins(pool, probes, names, lr)
    return probes


def _refuse_twins(pool: Executor, probes: dict[str, Any], names: Sequence[str], lr: float) -> None:
    """Two contenders that train to the same weights and outputs at the same lr are one."""
    digests = [probes[name]["digest"] for name in names]
    twins = [name for name, digest in zip(names, digests) if digest and digests.count(digest) > 1]
    seen: dict[str, str] = {}
    for name, held in (_probed(pool, twins, lr, whole=True) if twins else {}).items():
        probes[name]["digest"] = digest = held["digest"]
        if digest and digest in seen:
            raise InputError(f"{seen[digest]} and {name} are the same on this model: they train to the same weights")
        seen[digest] = name


def choose_engines(
    pool: Executor, voice: Voice, lines: Mapping[str, float], known: Mapping[str, Any], *, engine: str,
    runs: Mapping[str, int], seconds: Mapping[str, float], cells: int, workers: int,
) -> dict[str, Any]:  # fmt: skip
    """How each contender's cells are trained, decided once: by the plain loop or as a population, see `_engines`.

    ``known``: what an earlier race in this folder has decided. ``seconds`` of one of the ``runs`` of a contender;
    where all of them are short, nothing is tried. ``cells``: of the largest stage.
    """
    engines = {name: held for name, held in known.items() if name in lines}
    for name, held in engines.items():
        if engine not in ("auto", held["engine"]):
            raise InputError(
                f"engine={engine!r}: this folder's {name} runs as {held['engine']}; race in another folder"
            )
    size = math.ceil(cells / math.ceil(workers / len(lines)))  # or workers would stand idle
    for name in lines.keys() - engines.keys():
        whole = runs[name] * seconds[name]
        if engine == "loop" or (engine == "auto" and whole < SHORT):
            why = "as asked" if engine == "loop" else f"its {runs[name]} runs take {whole:.2g} s"
            engines[name] = asdict(How(why=why))
    tried = [name for name in lines if name not in engines]
    for name in tried:
        asked = {"lr": lines[name], "runs": runs[name], "cells": size, "workers": workers, "engine": engine}
        pool.submit({"kind": "engine", "contender": name, "asked": asked})
    for request, answer in pool.results():
        if "refused" in answer:
            raise InputError(answer["refused"])
        engines[request["contender"]] = asdict(How(why=answer["died"])) if "died" in answer else answer
    for name in tried:
        voice.line("engine", f"{name}: {engines[name]['engine']}, {engines[name]['why']}")
    return {**known, **engines}


def _probed(pool: Executor, names: Sequence[str], lr: float, whole: bool = False) -> dict[str, Any]:
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


def first_runs(
    pool: Executor, lines: Mapping[str, float], seed: int, known: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Outcome]]:
    """What one whole run of each contender costs, where a few steps cannot be tried: a run of its tuning, and kept."""
    for name, lr in lines.items():
        stage = "tune" if lr else "final"
        if name not in known:
            pool.submit(cell_request(Cell(name, stage, lr, seeds_of(stage, seed, 1)[0])))
    ran = [outcome_of(request, answer) for request, answer in pool.results()]
    base = next(iter(lines))
    for outcome in ran:
        if outcome.cell.contender == base and outcome.reason:
            raise InputError(f"the baseline {base} does not run: {outcome.reason}")
    found = {o.cell.contender: {"seconds": o.seconds, "bytes": 0} for o in ran}
    return {**known, **found}, ran
