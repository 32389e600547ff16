"""What is asked of a race: one value from the command line to the ledger, so that ``--continue`` asks the same."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from etude.race._errors import InputError, one_line
from etude.race.search import TRIALS, check_search

SEEDS = 10
"""Final seeds of each contender."""
FLOOR = 6
"""Fewer final seeds cannot reach p < .05 in an exact paired test."""
MOST = 1000
"""Seeds of one stage; the stages' ranges of seeds do not meet."""
LOOKS = (6, 10, 16, 30)
"""At how many final seeds a race that is looked at more than once is judged (R8)."""
ENGINES = ("auto", "loop", "population")
LOGS = ("wandb", "tensorboard", "mlflow")


@dataclass(frozen=True)
class Asked:
    """One field per option of ``etude race``; ``None`` is what the race decides by itself.

    ``task``: a built-in name, ``path/to/my_task.py:factory`` or a command. ``seeds``: final seeds. ``steps``: of one
    run; the task's own if None. ``workers``: processes. ``seed``: another seed, another race. ``engine``: how the
    cells of a contender are trained. ``on``: where they are, ``"here"`` or a cluster's name or address. ``log``: where
    else every finished run is written, see `loggers`.
    ``tune``: what is tuned of each contender. lr alone by default, although weight decay often matters as much (R3): a
    second value costs 9 more runs of each contender. ``search``, ``trials``: how, and tuning runs of each contender.
    ``looks``: judge at 6, 10, 16 and 30 seeds and end where every contender is decided. ``budget``, ``gpu_hours``:
    choose trials, seeds and looks to fit, and steps too if ``shorten``. ``barnacles``: take a winning stack apart.
    ``skip``: how many final seeds to pass over, since another judgement has used them.
    """

    task: str
    contenders: tuple[str, ...]
    baseline: str | None = None
    seeds: int | None = None
    steps: int | None = None
    workers: int | None = None
    device: str = "cpu"
    seed: int = 0
    engine: str = "auto"
    on: str = "here"
    tune: tuple[str, ...] = ("lr",)
    search: str | None = None
    trials: int | None = None
    looks: bool = False
    budget: str | None = None
    gpu_hours: float | None = None
    shorten: bool = False
    barnacles: bool = False
    skip: int = 0
    log: str | None = None

    @property
    def searched(self) -> tuple[str, int]:
        """How the contenders are tuned, and with how many runs each."""
        several = len({*self.tune, "lr"}) > 1
        trials = TRIALS[min(len({*self.tune, "lr"}), len(TRIALS)) - 1]
        return self.search or ("sobol" if several else "grid"), self.trials or trials

    @classmethod
    def of(cls, held: Mapping[str, Any]) -> Asked:
        """From plain values, as the ledger keeps them; a list is a tuple."""
        if unknown := sorted(held.keys() - {f.name for f in fields(cls)}):
            raise InputError(f"a race takes no {', '.join(unknown)}; it takes {', '.join(f.name for f in fields(cls))}")
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in held.items()}
        return cls(**given)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def check(self) -> None:
        """Refuse in one line what cannot be raced, before anything is started or written."""
        for name in ("seeds", "steps", "seed", "workers", "trials", "skip"):
            given = getattr(self, name)
            if given is not None and type(given) is not int:
                raise InputError(f"{name}={given!r}: this is not a whole number")
        if self.seeds is not None and not FLOOR <= self.seeds <= MOST:
            raise InputError(
                f"seeds={self.seeds}: a race takes {FLOOR} to {MOST} final seeds; fewer than {FLOOR} cannot decide "
                "anything"
            )
        if self.steps is not None and self.steps < 1:
            raise InputError(f"steps={self.steps}: a run takes at least one step")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: a seed is 0 or more")
        if self.skip < 0 or self.skip + (self.seeds or SEEDS) > MOST:
            raise InputError(f"skip={self.skip}: a race has {MOST} final seeds")
        check_search(self.searched[0], self.tune, self.searched[1])
        if self.gpu_hours is not None and not 0 < float(self.gpu_hours) < math.inf:
            raise InputError(f"gpu_hours={self.gpu_hours}: give a number of hours above 0")
        if self.budget is not None:
            seconds_of(self.budget)
        if self.budget and self.gpu_hours:
            raise InputError("budget and gpu_hours both say how long a race may take; give one")
        if self.shorten and not (self.budget or self.gpu_hours):
            raise InputError("shorten fits the steps to a budget; give a budget")
        if self.engine not in ENGINES:
            raise InputError(f"engine={self.engine!r}: it is one of {', '.join(ENGINES)}")
        if self.log is not None:
            log_of(self.log)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {self.device!r} is not to be had here: {one_line(error)}") from error


def seconds_of(budget: str | None) -> float:
    """``20m``, ``90s``, ``1h30m`` in seconds."""
    found = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", str(budget))
    seconds = sum(int(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1))) if found else 0
    if not seconds:
        raise InputError(f"budget={budget!r}: write it like 20m, 90s or 1h30m")
    return float(seconds)


def log_of(spec: str) -> tuple[str, str]:
    """The kind and the place of ``wandb``, ``tensorboard[:DIR]`` or ``mlflow[:URI]``."""
    kind, _, where = str(spec).partition(":")
    if kind not in LOGS or (kind == "wandb" and where):
        raise InputError(f"log={spec!r}: it is wandb, tensorboard:DIR or mlflow[:URI]")
    if importlib.util.find_spec(kind) is None:
        raise InputError(f'log={spec!r} needs {kind}; install it with: pip install "etude[loggers]"')
    return kind, where
