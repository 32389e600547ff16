"""What a race says while it runs, on stderr: bars with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

EVERY = 10.0
"""Seconds between two plain lines."""


class _Left(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{clock(task.fields['left'])} left" if task.fields["left"] is not None else "", style="dim")


class Voice:
    """Says lines, and how far each stage is. ``quiet`` says nothing."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(file=sys.stderr, quiet=quiet, highlight=False, soft_wrap=True)
        self._bars = Progress(
            TextColumn("{task.description:<9}"), BarColumn(20), MofNCompleteColumn(), _Left(),
            console=self._console, disable=quiet or not self._console.is_terminal,
        )  # fmt: skip
        self._stages: dict[str, int] = {}
        self._said = 0.0

    def line(self, label: str, text: str) -> None:
        """One line: a label and what it is about."""
        self._console.print(f"{label:<9} {text}", markup=False)

    def stage(self, name: str, done: int, total: int, left: float | None) -> None:
        """How far a stage is; ``left``: seconds until the whole race ends."""
        if name not in self._stages:
            self._stages[name] = self._bars.add_task(name, total=total, left=None)
        self._bars.update(self._stages[name], completed=done, total=total, left=left)  # type: ignore[arg-type]
        due = time.monotonic() - self._said >= EVERY or done == total
        if not self._console.is_terminal and due and done:
            self._said = time.monotonic()
            self.line(name, f"{done}/{total}" + (f", {clock(left)} left" if left is not None else ""))

    def __enter__(self) -> Voice:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()


def clock(seconds: float) -> str:
    """``01:05``, or ``2:01:05``."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes:02}:{rest:02}"
