"""What is asked of a race: one value from the command line to the ledger, so that ``--continue`` asks the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from etude.race._errors import InputError, one_line

SEEDS = 10
"""Final seeds of each contender."""
FLOOR = 6
"""Fewer final seeds cannot reach p < .05 in an exact paired test."""
MOST = 1000
"""Seeds of one stage; the stages' ranges of seeds do not meet."""
ENGINES = ("auto", "loop", "population")
LOGS = ("wandb", "tensorboard", "mlflow")


@dataclass(frozen=True)
class Asked:
    """One field per option of ``etude race``; ``None`` is what the race decides by itself.

    ``task``: a built-in name, ``path/to/my_task.py:factory`` or a command. ``seeds``: final seeds. ``steps``: of one
    run; the task's own if None. ``workers``: processes. ``seed``: another seed, another race. ``engine``: how the
    cells of a contender are trained. ``on``: where they are, ``"here"`` or a cluster's name or address. ``log``: where
    else every finished run is written, see `loggers`.
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
    log: str | None = None

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
        for name in ("seeds", "steps", "seed", "workers"):
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
        if self.engine not in ENGINES:
            raise InputError(f"engine={self.engine!r}: it is one of {', '.join(ENGINES)}")
        if self.log is not None:
            log_of(self.log)
        try:
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"device {self.device!r} is not to be had here: {one_line(error)}") from error


def log_of(spec: str) -> tuple[str, str]:
    """The kind and the place of ``wandb``, ``tensorboard[:DIR]`` or ``mlflow[:URI]``."""
    kind, _, where = str(spec).partition(":")
    if kind not in LOGS or (kind == "wandb" and where):
        raise InputError(f"log={spec!r}: it is wandb, tensorboard:DIR or mlflow[:URI]")
    if importlib.util.find_spec(kind) is None:
        raise InputError(f'log={spec!r} needs {kind}; install it with: pip install "etude[loggers]"')
    return kind, where
