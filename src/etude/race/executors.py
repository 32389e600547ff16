"""Where the cells of a race are trained, behind one interface. The ledger stays the record; an executor only places."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol

from etude.race._errors import InputError
from etude.race.pool import Pool, cores

Pair = tuple[dict[str, Any], dict[str, Any]]


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
    if on == "here":
        count = _workers(workers, device)
        return Pool(task, steps=steps, device=device, workers=count), count
    raise InputError(f'on={on!r}: a race runs "here"')


def _workers(asked: int | None, device: str) -> int:
    """As many processes as there are cores, each on one thread; one on any other device."""
    have = cores()
    if asked is not None and not 1 <= asked <= have:
        raise InputError(
            f"workers={asked}: this machine gives {have} core{'s' * (have > 1)}; more workers would slow each other"
        )
    return asked or (have if device == "cpu" else 1)
