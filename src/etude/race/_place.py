"""What the executors of a cluster share: a node answers as a worker process, if it is like the race's own."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import torch

from etude.race._errors import RaceError
from etude.race.plan import _source
from etude.race.pool import Worker
from etude.race.store import difference
from etude.race.subject import device_name


def standing(device: str) -> dict[str, str]:
    """What of a machine decides the bits of a result: the entries of the lock that a node might have otherwise (R1)."""
    return {
        "device": f"{platform.machine()} {device_name(device)}",
        "etude": _source(),
        "torch": torch.__version__,
    }


class Slot:
    """One worker process on whatever machine this is made on; it answers nothing where that is not like the race's."""

    def __init__(self, setup: str, device: str, expected: dict[str, str]) -> None:
        try:
            mine = standing(device)
            self.wrong = f"is not like the race's machine: {difference(expected, mine)}" * (mine != expected)
        except (RuntimeError, AssertionError) as error:
            self.wrong = f"has no {device}: {error}"
        self.worker = Worker(setup)

    def ready(self) -> None:
        """Answers as soon as there is a place where this can be."""

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The worker's answer, or why this node gives none."""
        if self.wrong:
            return {"strange": f"the node {platform.node()} {self.wrong}"}
        return self.worker.ask(request) or {"died": "its worker was stopped"}

    def ask_all(self, requests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """One answer after another."""
        try:
            yield from map(self.ask, requests)
        finally:
            self.worker.stop()
            self.worker.close()


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer of a node, if it may be used."""
    if "strange" in answer:
        raise RaceError(f"{answer['strange']}; name nodes that are alike, or race there from the start")
    return answer
