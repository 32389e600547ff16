"""Which engine trains a contender's cells: both routes timed warm, the build counted in, one cell verified (R7)."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from etude.gradients import plain
from etude.race._errors import one_line
from etude.race._model import Cell
from etude.race._stacks import Unfit
from etude.race.loop import EVALUATIONS, Run, stream_seed
from etude.race.population import How, Population
from etude.race.task import Factory, to_device

SHORT = 5.0
"""Seconds of a contender's runs below which the plain loop is not worth replacing."""
BUILD = 0.1
"""Seconds that the compiler takes for an operation of the trace, about."""
PAYS = 10.0
"""Kernels are tried where a contender's runs take so many times their build: what does not help costs little then."""
FEWEST = 3
"""Fewer cells than these are trained one by one."""
STEPS = 20
TOLERANCE = 0.02
"""How far a cell of the population may be from the loop's after `STEPS` steps: weights as a share of the way they have
come, metric as a share of itself. Rounding alone takes bfloat16 products to about 1e-3, the rest to 1e-5."""
SHARE = 0.5
"""Of the free memory, for all workers together."""


def choose(
    factory: Factory, contender: str, *, lr: float, steps: int, device: str, runs: int, cells: int, workers: int,
    engine: str,
) -> How:  # fmt: skip
    """How the ``runs`` of a contender are to be trained, in programs of up to ``cells``. ``engine``: as asked.

    Where a population cannot be had, or is slower, it is the loop, and ``why`` says so.
    """
    one = How()
    try:
        loop = Run(factory, Cell(contender, "probe", lr, 0), steps=steps, device=device)
        random = _draws(loop)
        one = _alone(loop, steps)
        if engine == "auto" and runs * one.seconds < SHORT:
            return replace(one, why=f"its {runs} runs take {runs * one.seconds:.2g} s")
        if random and loop.gradient != plain():
            raise Unfit(f"{loop.gradient} wants the same dropout masks twice")
        size = min(cells, _fitting(loop, workers))
        if size < FEWEST:
            raise Unfit(f"memory for {size} at a time" if size < cells else f"{cells} cells at a time")
        found = _fastest(
            replace(one, engine="population", size=size), factory, contender, lr, steps, device, runs, workers
        )
        _verify(found, factory, contender, lr, steps, device, evaluating=random)
    except Exception as error:  # what goes wrong with the contender itself is for its runs to say
        why = one_line(error) if isinstance(error, Unfit) else f"{type(error).__name__}: {one_line(error)}"
        return replace(one, why=why)
    gain = one.seconds / found.seconds
    if engine == "auto" and gain <= 1:
        return replace(one, why=f"a population of {found.size} takes {1 / gain:.2g} × its time")
    made = "compiled" if found.compiled else "traced"
    masks = ", dropout masks of its own" if random else ""
    return replace(found, why=f"{found.size} at a time, {made}, {gain:.2g} × as fast as one by one{masks}")


def _alone(loop: Run, steps: int) -> How:
    """The plain loop, with what a run of it costs."""
    loop.model.train()
    step = _timed(loop.step, loop.now)
    evaluation = _timed(lambda: loop.measure(loop.task.valid), loop.now, most=3)
    return How("loop", 1, False, step, loop.state_bytes(), "", step * steps + EVALUATIONS * evaluation)


def _fastest(
    how: How, factory: Factory, contender: str, lr: float, steps: int, device: str, runs: int, workers: int
) -> How:
    """The trace, or kernels instead where the race is long enough to try them and they are faster."""
    cells = [Cell(contender, "probe", lr, seed) for seed in range(how.size)]

    def measured(compiled: bool) -> tuple[How, int]:
        """With the seconds of one run: its share of a chunk's setting up, steps and evaluations, and of the builds
        that the other workers have yet to make. And of how many operations the program is."""
        asked = replace(how, compiled=compiled)
        began = _now(device)
        Population(factory, cells, asked, steps=steps, device=device)
        ready = _now(device)
        crew = Population(factory, cells, asked, steps=steps, device=device)  # finds the program built
        again = _now(device) - ready
        step = _timed(crew.step, lambda: _now(device))
        evaluation = _timed(lambda: crew.measure(crew.task.valid), lambda: _now(device), most=2)
        seconds = (again + step * steps + evaluation * EVALUATIONS) / how.size
        build = (ready - began - again) * (workers - 1) / runs
        return replace(asked, seconds=seconds + build), crew.stacks.operations

    trace, operations = measured(compiled=False)
    if not operations or min(trace.seconds, how.seconds) * runs < PAYS * BUILD * operations:
        return trace
    try:
        return min(trace, measured(compiled=True)[0], key=lambda h: h.seconds)
    except Exception:  # no compiler, or it cannot build this: the trace serves
        return trace


def _verify(
    how: How, factory: Factory, contender: str, lr: float, steps: int, device: str, *, evaluating: bool
) -> None:
    """The last row after a few steps against the plain loop; a model that draws is compared in evaluation mode."""
    cell = Cell(contender, "probe", lr, how.size - 1)
    cells = [*(Cell(contender, "probe", lr / 3, seed) for seed in range(how.size - 1)), cell]
    crew = Population(factory, cells, how, steps=steps, device=device, training=not evaluating)
    loop = Run(factory, cell, steps=steps, device=device)
    loop.model.train(not evaluating)
    before = {n: p.detach().clone() for n, p in loop.model.named_parameters()}
    for _ in range(min(STEPS, steps)):
        loop.step()
        crew.step()
    off, moved = 0.0, 0.0
    weights = crew.stacks.weights()
    for n, p in loop.model.named_parameters():
        off += (weights[n][-1] - p.detach()).double().square().sum().item()
        moved += (p.detach() - before[n]).double().square().sum().item()
    mine, its = crew.measure(crew.task.valid)[-1], loop.measure(loop.task.valid)
    apart = max(math.sqrt(off / moved) if moved else off, abs(mine - its) / max(abs(its), 1e-12))
    if not math.isfinite(its):
        raise Unfit(f"the loop's metric is {its} after {STEPS} steps, so that nothing can be compared")
    if not apart <= TOLERANCE:
        raise Unfit(f"after {min(STEPS, steps)} steps a cell is {apart:.2g} off the plain loop")


def _draws(run: Run) -> bool:
    """Whether the model draws random numbers in training."""
    inputs, targets = (to_device(part, run.device) for part in next(run.stream))
    found = []
    kept = {n: b.clone() for n, b in run.model.named_buffers()}
    run.model.train()
    with torch.no_grad():
        for i in (1, 2):
            torch.manual_seed(i)
            found.append(run.task.training_loss(run.model, inputs, targets))
            for n, b in run.model.named_buffers():
                b.copy_(kept[n])
    torch.manual_seed(stream_seed(0, "noise"))
    return not torch.equal(*found)


def _fitting(run: Run, workers: int) -> int:
    """How many cells fit in memory: weights, gradients and state, and what a forward pass keeps, twice for its way
    back."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs, targets = (to_device(part, run.device) for part in next(run.stream))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run.task.training_loss(run.model, inputs, targets)
    weights = sum(p.nbytes for p in run.model.parameters())
    return int(SHARE * _free(run.device) / workers / (2 * sum(kept.values()) + 5 * weights + run.state_bytes()))


def _free(device: str) -> float:
    """Bytes of memory to be had."""
    if device != "cpu":
        return float(torch.cuda.mem_get_info(device)[0])
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable"):
            return float(line.split()[1]) * 1024
    return 2.0**31


def _now(device: str) -> float:
    """The clock of `Run.now`, so that the routes are compared in one currency."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def _timed(play: Callable[[], Any], now: Callable[[], float], most: int = 25, patience: float = 2.0) -> float:
    """Median seconds of a call, warm: after one fifth of ``most`` calls, or of ``patience`` seconds."""
    began, taken = now(), list[float]()
    while len(taken) < 2 or (len(taken) < most and now() - began < patience):
        start = now()
        play()
        taken.append(now() - start)
    return statistics.median(taken[len(taken) // 5 :])
