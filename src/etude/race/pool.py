"""Worker processes, one torch thread each. When one dies its cell is tried once more; then that is its outcome."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from etude.race._errors import InputError, RaceError, one_line
from etude.race._model import Cell, Outcome
from etude.race.store import decoded

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
FULL = re.compile(r"raised (MemoryError|OutOfMemoryError|\w+: .*(out of memory|can't allocate memory|ALLOC_FAILED))")
"""How a run that was out of memory ends: in Python's words, in torch's of a GPU and of a CPU, and in cuBLAS's."""


def cores() -> int:
    """How many cores this process may use: its affinity, and the quota of its control group where there is one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return count
    return count if quota == "max" else max(1, min(count, round(int(quota) / int(period))))


def devices(device: str, workers: int) -> list[dict[str, str]]:
    """What of the environment is each worker's own: where there are several GPUs, each sees one, in turn."""
    count = torch.cuda.device_count() if device == "cuda" else 0
    if count < 2:
        return [{} for _ in range(workers)]
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(",")
    return [{"CUDA_VISIBLE_DEVICES": names[i % count].strip()} for i in range(workers)]


def setup(task: str, *, steps: int, device: str) -> str:
    """What a worker is started with."""
    return json.dumps({"task": task, "steps": steps, "device": device})


class Worker:
    """One worker process: started when it is first asked, and anew after a death or when it was out of memory."""

    def __init__(self, setup: str, env: Mapping[str, str] | None = None) -> None:
        self._setup, self._env = setup, {**ONE_THREAD, **(env or {})}
        self._process: subprocess.Popen[str] | None = None
        self._open, self._guard = True, threading.Lock()

    def ask(self, request: dict[str, Any]) -> dict[str, Any] | None:
        """The answer, ``{"died": why}`` where the process has died of the request twice, or None: it was stopped."""
        code = 0
        for _ in range(2):
            process = self._process or self._start()
            if process is None:
                return None
            if (answer := _exchange(process, request)) is not None:
                if out_of_memory(answer):  # what it still holds would be missing to the next cell
                    self.close()
                return answer
            code = self.close(patience=5.0)
        return {"died": _death(code)}

    def stop(self) -> None:
        """End the process at once, whatever it is doing, for good; from any thread. `close` then tidies up."""
        with self._guard:
            self._open = False
            if self._process is not None:
                self._process.kill()

    def close(self, patience: float = 0.0) -> int:
        """Make sure that the process is gone; its exit code. ``patience``: seconds in which it may end by itself."""
        process = self._process
        if process is None:
            return 0
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
        process.kill()
        with self._guard:
            self._process = None
        with suppress(BrokenPipeError), process:  # closes its pipes
            pass
        return process.wait()

    def _start(self) -> subprocess.Popen[str] | None:
        with self._guard:
            if not self._open:
                return None
            self._process = subprocess.Popen(
                [sys.executable, "-m", "etude.race._worker", self._setup],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, **self._env},
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for the race to hear, not for its workers
            )
            return self._process


class Pool:
    """``workers`` processes that train cells of one task.

    ``with Pool(...) as pool``: ``submit`` requests, ``results()`` yields (request, answer) as they finish, until none
    is left. Leaving the block ends every worker at once, whatever it is doing.
    """

    def __init__(self, task: str, *, steps: int, device: str, workers: int) -> None:
        self._asked: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._answered: queue.Queue[tuple[dict[str, Any], dict[str, Any]] | BaseException] = queue.Queue()
        self._left, told = 0, setup(task, steps=steps, device=device)
        self._workers = [Worker(told, env) for env in devices(device, workers)]
        self._threads = [threading.Thread(target=self._attend, args=(w,), daemon=True) for w in self._workers]

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
        for worker in self._workers:
            worker.stop()
        for _thread in self._threads:
            self._asked.put(None)
        for thread in self._threads:
            thread.join()

    def _attend(self, worker: Worker) -> None:
        """One thread attends one worker. What goes wrong in it is told where the answers are awaited, or they would be
        awaited for ever."""
        try:
            while (request := self._asked.get()) is not None:
                if (answer := worker.ask(request)) is None:
                    break
                self._answered.put((request, answer))
        except BaseException as error:
            self._answered.put(error)
        finally:
            worker.close()


def out_of_memory(answer: Mapping[str, Any]) -> bool:
    """Whether the process that gave this answer has run out of memory."""
    outcomes = answer.get("outcomes", [answer])
    return any(FULL.match(str(outcome.get("reason", ""))) for outcome in outcomes)


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
