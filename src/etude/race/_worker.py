"""A worker process: reads one JSON request per line, trains on one thread, answers with one JSON line.

Started as ``python -m etude.race._worker``, so that nothing of the caller's ``__main__`` is imported again.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from dataclasses import asdict
from typing import Any, TextIO

import torch

from etude.race._errors import InputError, one_line
from etude.race._model import Cell
from etude.race.subject import TaskSubject, find


def _serve(lines: queue.Queue[str], out: TextIO, setup: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    subject = find(setup["task"])
    how = {"steps": setup["steps"], "device": setup["device"]}
    while True:
        asked = json.loads(lines.get())
        answer: dict[str, Any]
        try:
            if asked["kind"] == "cell":
                answer = asdict(subject.train(Cell.of(asked["cell"]), **how))
            elif asked["kind"] == "cells":
                assert isinstance(subject, TaskSubject)
                outcomes, why = subject.train_cells([Cell.of(cell) for cell in asked["cells"]], asked["how"], **how)
                answer = {"outcomes": [asdict(outcome) for outcome in outcomes], "why": why}
            elif asked["kind"] == "engine":
                assert isinstance(subject, TaskSubject)
                answer = subject.choose(asked["contender"], **asked["asked"], **how)
            else:
                answer = subject.probe(asked["contender"], lr=asked["lr"], whole=asked["whole"], **how)
        except InputError as error:
            answer = {"refused": one_line(error)}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _main() -> None:
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a task prints goes to stderr, never into the answers
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)  # the race has closed the pipe, or died: stop at once, whatever is being trained

    threading.Thread(target=read, daemon=True).start()
    _serve(lines, out, json.loads(sys.argv[1]))


if __name__ == "__main__":
    _main()
