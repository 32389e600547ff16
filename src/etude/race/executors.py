"""Where the cells of a race are trained, behind one interface. The ledger stays the record; an executor only places."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

import torch

from etude.race._errors import InputError
from etude.race._ray import Ray
from etude.race.pool import Pool, cores
from etude.race.slurm import Jobs

Pair = tuple[dict[str, Any], dict[str, Any]]
PLACES = "here, slurm, slurm:PARTITION, submitit-local, ray, ray:HOST:PORT or ray://HOST:PORT"


class Executor(Protocol):
    """``with executor``: ``submit`` requests, ``results()`` yields (request, answer) as they finish, to the last.

    A request is plain JSON: ``{"kind": "cell", …}`` or ``{"kind": "probe", …}``; the answer is the worker's, or
    ``{"died": why}``. Leaving the block ends whatever still runs.
    """

    def submit(self, request: dict[str, Any]) -> None: ...

    def results(self) -> Iterator[Pair]: ...

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_executor(on: str, task: str, *, steps: int, device: str, workers: int | None) -> tuple[Executor, int]:
    """The executor and how many runs it trains at a time."""
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers}: a race takes at least one")
    kind, _, where = on.partition(":")
    if on == "here":
        count = _workers(workers, device)
        return Pool(task, steps=steps, device=device, workers=count), count
    if kind == "slurm" or on == "submitit-local":
        jobs = Jobs(task, steps=steps, device=device, workers=workers, partition=where, local=kind != "slurm")
        return jobs, jobs.workers
    if kind == "ray":
        address = on if where.startswith("//") else where
        ray = Ray(task, steps=steps, device=device, workers=workers, address=address, here=_workers(None, device))
        return ray, ray.workers
    raise InputError(f"on={on!r}: a race runs on {PLACES}")


def on_ray(address: str) -> str:
    """``--ray auto`` and ``--ray HOST:PORT`` as the ``on`` of a race."""
    if address in ("", "auto"):
        return "ray"
    return address if address.startswith("ray://") else f"ray:{address}"


def _workers(asked: int | None, device: str) -> int:
    """As many processes as there are cores, each on one thread; on any other device one for each there is."""
    have = cores()
    if asked is not None and asked > have:
        raise InputError(
            f"workers={asked}: this machine gives {have} core{'s' * (have > 1)}; more workers would slow each other"
        )
    return asked or (have if device == "cpu" else max(1, torch.cuda.device_count() if device == "cuda" else 1))
