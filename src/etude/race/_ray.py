"""Requests on a Ray cluster: one actor per worker, each with a worker process of its own. Ray places, nothing else."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from etude.race._errors import InputError, RaceError, one_line
from etude.race._place import Slot, checked, standing
from etude.race.pool import setup

STORE = 2**27
"""Bytes of Ray's object store on a cluster started here: requests and answers are small."""
PATIENCE = 300.0
"""Seconds in which a cluster may find a place for a worker when none is left; then the race ends."""
Request = dict[str, Any]


class Ray:
    """An executor on the Ray cluster at ``address``; on the one that runs here, or a new one, where that is ""."""

    def __init__(
        self, task: str, *, steps: int, device: str, workers: int | None, address: str = "", here: int = 1
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError as error:
            raise InputError('racing on Ray needs ray; install it with: pip install "etude[ray]"') from error
        self._ray, self._device = ray, device
        self._own = not ray.is_initialized()
        if self._own:
            self._connect(address, min(here, workers or here))
        kind = "CPU" if device == "cpu" else "GPU"
        have = int(ray.cluster_resources().get(kind, 0))
        if have < (workers or 1):
            self._leave()
            raise InputError(f"workers={workers or 1}: this Ray cluster has {have} {kind}{'s' * (have != 1)}")
        self.workers = workers or have
        self._setup = setup(task, steps=steps, device=device)
        self._waiting: deque[tuple[Request, int]] = deque()
        self._asked: dict[Any, tuple[Any, Request | None, int]] = {}
        self._idle: list[Any] = []
        self._all: list[Any] = []

    def submit(self, request: Request) -> None:
        """Queue a request."""
        self._waiting.append((request, 0))

    def results(self) -> Iterator[tuple[Request, dict[str, Any]]]:
        """(request, answer) pairs as they finish; more may be submitted meanwhile."""
        alone = time.monotonic()
        while self._waiting or any(request for _, request, _ in self._asked.values()):
            while self._waiting and self._idle:
                actor, (request, tries) = self._idle.pop(), self._waiting.popleft()
                self._asked[actor.ask.remote(request)] = actor, request, tries
            ready, _ = self._ray.wait(list(self._asked), timeout=1.0)
            if ready or any(request for _, request, _ in self._asked.values()):
                alone = time.monotonic()
            elif time.monotonic() - alone > PATIENCE:
                raise RaceError(f"the Ray cluster has had no place for a worker for {PATIENCE:.0f} s; "
                                "the finished runs are kept, run the same command to resume")  # fmt: skip
            for ref in ready:
                yield from self._heard(ref)

    def _heard(self, ref: Any) -> Iterator[tuple[Request, dict[str, Any]]]:
        """What came of one call: an answer, a worker that has begun, or one that is gone with its process or node."""
        actor, request, tries = self._asked.pop(ref)
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as error:
            self._ray.kill(actor)
            self._all.remove(actor)
            self._start()
            if request is not None and tries:
                yield request, {"died": f"its place in the cluster was lost twice ({type(error).__name__})"}
            elif request is not None:
                self._waiting.appendleft((request, 1))
        except self._ray.exceptions.RayError as error:
            raise RaceError(f"a worker cannot be started or heard: {one_line(error)}") from error
        else:
            self._idle.append(actor)
            if request is not None:
                yield request, checked(answer)

    def _start(self) -> None:
        """One more worker; it is handed nothing until it has said that it is there."""
        gpus = 0 if self._device == "cpu" else 1
        kind = self._ray.remote(Slot).options(num_cpus=1, num_gpus=gpus, max_restarts=0)
        actor = kind.remote(self._setup, self._device, self._expected)
        self._all.append(actor)
        self._asked[actor.ready.remote()] = actor, None, 0

    def __enter__(self) -> Ray:
        self._expected = standing(self._device)
        for _ in range(self.workers):
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        for actor in self._all:
            with suppress(Exception):  # a cluster that is gone has nothing left to end
                self._ray.kill(actor)
        self._asked.clear()
        self._all.clear()
        self._leave()

    def _leave(self) -> None:
        if self._own:
            self._ray.shutdown()

    def _connect(self, address: str, cpus: int) -> None:
        """Join a cluster; where none is named and none runs here, start one on this machine."""
        silent: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if address:
            _reach(address)
        try:
            self._ray.init(address or "auto", **silent)
        except ConnectionError as error:
            if address or os.environ.get("RAY_ADDRESS"):
                raise RaceError(
                    f"no Ray cluster at {address or os.environ['RAY_ADDRESS']}: {one_line(error)}"
                ) from error
            self._ray.init("local", num_cpus=cpus, object_store_memory=STORE, include_dashboard=False, **silent)
        except (RuntimeError, ValueError) as error:
            raise RaceError(f"cannot join the Ray cluster at {address or 'auto'}: {one_line(error)}") from error


def _reach(address: str) -> None:
    """Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"a Ray cluster's address is HOST:PORT or ray://HOST:PORT; this is {address!r}")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise RaceError(f"no Ray cluster at {address}: {error.strerror or error}") from error
