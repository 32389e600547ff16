"""Worker processes, one torch thread each. When one dies its cell is tried once more; then that is its outcome."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from etude.race._errors import InputError, RaceError, one_line
from etude.race._model import Cell, Outcome
from etude.race.store import decoded


def cores() -> int:
    """How many cores this process may use: its affinity, and the quota of its control group where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


class Pool:
    """``workers`` processes that train cells of one task.

    ``with Pool(...) as pool``: ``submit`` requests, ``results()`` yields (request, answer) as they finish, until none
    is left. Leaving the block ends every worker at once, whatever it is doing.
    """

    def __init__(self, task: str, *, steps: int, device: str, workers: int) -> None:
        self._setup = json.dumps({"task": task, "steps": steps, "device": device})
        self._asked: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._answered: queue.Queue[tuple[dict[str, Any], dict[str, Any]] | BaseException] = queue.Queue()
        self._running: list[subprocess.Popen[str]] = []
        self._open, self._left, self._guard = True, 0, threading.Lock()
        self._threads = [threading.Thread(target=self._attend, daemon=True) for _ in range(workers)]

    def submit(self, request: dict[str, Any]) -> None:
        """Queue a request: ``{"kind": "cell", "cell": …}`` or ``{"kind": "probe", …}``."""
        self._left += 1
        self._asked.put(request)

    def results(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """(request, answer) pairs as they finish; more may be submitted meanwhile."""
        while self._left:
            pair = self._answered.get()
            if isinstance(pair, BaseException):
                raise RaceError(f"a worker cannot be started or heard: {one_line(pair)}") from pair
            self._left -= 1
            yield pair

    def __enter__(self) -> Pool:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._guard:
            self._open = False
            for worker in self._running:
                worker.kill()
        for _thread in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()

    def _attend(self) -> None:
        """What goes wrong in a thread is told where the answers are awaited, or they would be awaited for ever."""
        try:
            self._hand_on()
        except BaseException as error:
            self._answered.put(error)

    def _hand_on(self) -> None:
        """One thread attends one worker: hand it a request, wait for the answer, replace it when it dies."""
        worker: subprocess.Popen[str] | None = None
        while (request := self._asked.get()) is not None:
            answer: dict[str, Any] | None = None
            for _ in range(2):
                worker = worker or self._start()
                if worker is None:  # the pool is closed
                    return
                if (answer := _exchange(worker, request)) is not None:
                    break
                code, worker = self._end(worker, patience=5.0), None
            self._answered.put((request, answer or {"died": _death(code)}))
        if worker is not None:
            self._end(worker)

    def _start(self) -> subprocess.Popen[str] | None:
        with self._guard:
            if not self._open:
                return None
            worker = subprocess.Popen(
                [sys.executable, "-m", "etude.race._worker", self._setup],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the race to hear, not for its workers
            )
            self._running.append(worker)
            return worker

    def _end(self, worker: subprocess.Popen[str], patience: float = 0.0) -> int:
        """Make sure that a worker is gone; its exit code. ``patience``: seconds in which it may end by itself."""
        with suppress(subprocess.TimeoutExpired):
            worker.wait(patience)
        worker.kill()
        with self._guard:
            self._running.remove(worker)
        with worker:  # closes its pipes
            return worker.wait()


def _exchange(worker: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any] | None:
    assert worker.stdin is not None
    assert worker.stdout is not None
    try:
        worker.stdin.write(json.dumps(request) + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
    except (OSError, ValueError):
        return None
    if not line.endswith("\n"):
        return None
    answer: dict[str, Any] = json.loads(line)
    return answer


def _death(code: int) -> str:
    return f"its process was killed twice (signal {-code})" if code < 0 else f"its process ended twice (exit {code})"


def outcome_of(request: dict[str, Any], answer: dict[str, Any]) -> Outcome:
    """The outcome of a cell request; a worker that died is a failed outcome."""
    if "refused" in answer:
        raise InputError(answer["refused"])
    if "died" in answer:
        return Outcome(Cell.of(request["cell"]), None, answer["died"], (), 0.0, 0.0, 0)
    return decoded(answer)


def cell_request(cell: Cell) -> dict[str, Any]:
    """The request that trains a cell."""
    return {"kind": "cell", "cell": asdict(cell)}
