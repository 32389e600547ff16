"""Which of these methods helps *your* model? ``etude.race(task, contenders)`` answers, with its uncertainty."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from etude.race import data as data
from etude.race._errors import InputError as InputError
from etude.race._errors import RaceError as RaceError
from etude.race._model import Cell as Cell
from etude.race._model import Outcome as Outcome
from etude.race._model import Plan as Plan
from etude.race._model import Result as Result
from etude.race._model import Standing as Standing
from etude.race.bridges import from_lightning as from_lightning
from etude.race.bridges import from_trainer as from_trainer
from etude.race.command import command as command
from etude.race.task import Task as Task

if TYPE_CHECKING:
    from etude.race._branch import branch as branch
    from etude.race._run import race as race
    from etude.race._run import resume as resume
    from etude.race.report import table as table
    from etude.race.report import to_json as to_json
    from etude.race.report import write_html as write_html

__all__ = [
    "Cell", "InputError", "Outcome", "Plan", "RaceError", "Result", "Standing", "Task", "branch", "command", "data",
    "from_lightning", "from_trainer", "race", "resume", "table", "to_json", "write_html",
]  # fmt: skip
_OWN = ("race", "resume", "table", "to_json", "write_html")


def __getattr__(name: str) -> Any:
    if name == "branch":
        return importlib.import_module("etude.race._branch").branch
    if name in _OWN:  # statistics and charts: a worker, which imports this package too, starts sooner without them
        return getattr(importlib.import_module("etude.race._run"), name)
    raise AttributeError(f"module 'etude.race' has no attribute {name!r}")


class _Race(ModuleType):
    """The room itself can be called: ``etude.race(...)`` is ``etude.race.race(...)``."""

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return self.race(*args, **kwargs)  # type: ignore[no-any-return]


sys.modules[__name__].__class__ = _Race
