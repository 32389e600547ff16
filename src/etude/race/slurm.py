"""Requests as job arrays, by submitit. Each job answers its share of them, one after another, into a file of its own.

Every answer is on the disk before the next run begins: of a job that dies, the request it was at is tried once more,
and those behind it are handed to another job.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.race._errors import InputError, RaceError, one_line
from etude.race._place import Slot, checked, standing
from etude.race.pool import setup

AT_A_TIME = 16
"""Jobs at a time, where nothing else is asked."""
SHARE = 60.0
"""Seconds that a job should at least take, once it is known what a run takes; a job needs some to begin."""
HOURS = 24
"""The longest a job may take; SBATCH_TIMELIMIT says otherwise."""
ARRIVES = 15.0
"""Seconds in which the last answers of a job that has ended may still arrive over a network's file system."""
Request = dict[str, Any]


@dataclass
class _Job:
    """One job of an array and what it was asked: ``answered`` of it so far, in the first ``read`` bytes of ``file``.

    ``ended``: when it was seen to be over.
    """

    held: Any
    file: Path
    asked: list[tuple[Request, int]]
    answered: int = 0
    ended: float | None = None
    read: int = 0


class Jobs:
    """An executor that trains on a Slurm cluster, or, to try it out, in processes here that submitit starts as jobs."""

    def __init__(
        self, task: str, *, steps: int, device: str, workers: int | None, partition: str = "", local: bool = False
    ) -> None:
        try:
            import submitit
        except ModuleNotFoundError as error:
            raise InputError('racing on Slurm needs submitit; install it with: pip install "etude[slurm]"') from error
        if not local and shutil.which("sbatch") is None:
            raise InputError("there is no Slurm here (no sbatch); race on a machine that submits to it")
        self.workers = workers or (2 if local else AT_A_TIME)
        self._make, self._local, self._partition = submitit.AutoExecutor, local, partition
        self._setup, self._device = setup(task, steps=steps, device=device), device
        self._waiting: list[tuple[Request, int]] = []
        self._running: list[_Job] = []
        self._seconds = 0.0

    def submit(self, request: Request) -> None:
        """Queue a request; what waits is handed out when answers are awaited."""
        self._waiting.append((request, 0))

    def results(self) -> Iterator[tuple[Request, dict[str, Any]]]:
        """(request, answer) pairs as they finish; more may be submitted meanwhile."""
        pause = 0.05
        while self._waiting or self._running:
            self._place()
            found = False
            for job in list(self._running):
                for pair in self._answers(job):
                    found = True
                    yield pair
            pause = 0.05 if found else min(2.0, 1.3 * pause)
            if not found:
                time.sleep(pause)

    def __enter__(self) -> Jobs:
        try:  # where the cluster's nodes see it too, which they do not of /tmp
            self._folder = Path(tempfile.mkdtemp(prefix=".etude-jobs-", dir=Path.cwd()))
        except OSError as error:
            raise RaceError(f"cannot write in {Path.cwd()}, where the jobs would answer: {error.strerror}") from error
        try:
            self._expected = standing(self._device)
            self._executor = self._make(self._folder, cluster="local" if self._local else "slurm")
            self._executor.update_parameters(
                name="etude", timeout_min=60 * HOURS, cpus_per_task=1, slurm_array_parallelism=self.workers,
                **({} if self._device == "cpu" else {"gpus_per_node": 1}),
                **({"slurm_partition": self._partition} if self._partition else {}),
            )  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._running:
            if self._local:
                for job in self._running:
                    job.held.cancel()
                end = time.monotonic() + 5
                while time.monotonic() < end and not all(job.held.done() for job in self._running):
                    time.sleep(0.02)
            else:
                with suppress(OSError):
                    subprocess.run(["scancel", *sorted({job.held.job_id for job in self._running})], check=False)
        self._running.clear()
        self._waiting.clear()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _place(self) -> None:
        """As many jobs as there is room for, in one array, with what waits dealt out among them like cards."""
        room = min(self.workers - len(self._running), len(self._waiting))
        if room <= 0:
            return
        size = -(-len(self._waiting) // room)
        if self._seconds:  # or a job would keep many long runs that another, done with its own, could take
            size = min(size, max(1, int(SHARE / self._seconds)))
        dealt, self._waiting = self._waiting[: room * size], self._waiting[room * size :]
        shares = [dealt[i::room] for i in range(room)]
        files = [self._folder / f"{uuid.uuid4().hex}.jsonl" for _ in shares]
        for file in files:
            file.touch()
        asked = [[request for request, _ in share] for share in shares]
        alike = ([same] * room for same in (self._setup, self._device, self._expected))
        try:
            with _outside_a_job():
                held = self._executor.map_array(answer_all, asked, map(str, files), *alike)
        except Exception as error:
            raise RaceError(f"the jobs cannot be submitted: {one_line(error)}") from error
        self._running += [_Job(*each) for each in zip(held, files, shares)]

    def _answers(self, job: _Job) -> Iterator[tuple[Request, dict[str, Any]]]:
        """What a job has answered since it was last looked at; what one that is over leaves is asked again, or died."""
        over = bool(job.held.done())  # before its file is read
        for line in _lines(job):
            (request, _), answer = job.asked[job.answered], checked(json.loads(line))
            job.answered += 1
            job.ended = None
            self._seconds = max(self._seconds, answer.get("seconds") or 0.0)
            yield request, answer
        if job.answered == len(job.asked):
            self._running.remove(job)
        elif over:
            job.ended = job.ended or time.monotonic()
            if time.monotonic() - job.ended >= (0.0 if self._local else ARRIVES):
                self._running.remove(job)
                (request, tries), *rest = job.asked[job.answered :]
                self._waiting[:0] = rest
                if tries:
                    yield request, {"died": f"its job ended twice ({_why(job)})"}
                else:
                    self._waiting.insert(0, (request, 1))


def answer_all(requests: list[Request], file: str, setup: str, device: str, expected: dict[str, str]) -> None:
    """What runs as a job: one worker process answers one request after another."""
    slot = Slot(setup, device, expected)
    with Path(file).open("ab") as out:
        for answer in slot.ask_all(requests):
            out.write(json.dumps(answer).encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())


def _lines(job: _Job) -> list[bytes]:
    """The whole lines that have come since; opened anew, or a network's file system would not look."""
    with job.file.open("rb") as file:
        file.seek(job.read)
        *whole, _torn = file.read().split(b"\n")
    job.read += sum(len(line) + 1 for line in whole)
    return whole


def _why(job: _Job) -> str:
    """The state of a job that is over and the last line it said."""
    said = (job.held.stderr() or "").strip().splitlines()
    return f"{str(job.held.state).lower()}{': ' + said[-1].strip()[:200] if said else ''}"


@contextmanager
def _outside_a_job() -> Iterator[None]:
    """Jobs submitted from within a job would inherit its limits."""
    own = [name for name in os.environ if name.startswith("SLURM_") and name != "SLURM_CONF"]
    kept = {name: os.environ.pop(name) for name in own}
    try:
        yield
    finally:
        os.environ.update(kept)
