"""The tasks that come with etude, a module for each kind of data; how a task is found by name, path or parts.

A public function of a module here that returns a Task is a task: ``task`` under the module's name, e.g. ``digits``,
any other after a colon, e.g. ``digits:conv``.
"""

from etude.race.tasks._find import OPTIONS as OPTIONS
from etude.race.tasks._find import Found as Found
from etude.race.tasks._find import builtin as builtin
from etude.race.tasks._find import find_task as find_task
from etude.race.tasks._find import refuse_while_importing as refuse_while_importing

__all__ = ["OPTIONS", "Found", "builtin", "find_task", "refuse_while_importing"]
